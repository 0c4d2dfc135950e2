"""From documents to batches: tokenised once into one flat file, cut into sequences, visited in a seeded order.

The order is a pure function: sequence j of step t is the same whatever the number of ranks, and the cursor of a resumed
run is its step.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer import heldout
from trainer.batch import Batch
from trainer.causal import check_causal
from trainer.config import TrainingSpec
from trainer.datasetconfig import Stream
from trainer.documents import documents
from trainer.errors import DataError
from trainer.events import Preparing
from trainer.modelconfig import PresetModel
from trainer.order import Order, groups
from trainer.preflight import check_length
from trainer.rundir import META, TOKENS
from trainer.task import Making, Measured

_DOCUMENTS_AT_ONCE = 256
_SECONDS_BETWEEN_REPORTS = 2.0


def tokenise(making: Making) -> dict[str, Any] | None:
    """What meta.json says of the tokens; None when a stop was requested. Raises DataError when there are too few."""
    spec, tokenizer = making.spec, making.tokenizer
    making.emit(Preparing(step=0, what="tokenising the dataset"))
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    tokens, sha256, reported = 0, hashlib.sha256(), time.monotonic()
    with (making.rundir.data / TOKENS).open("wb") as file:
        for group in groups(documents(_stream(spec)), _DOCUMENTS_AT_ONCE):
            if making.stop_requested():
                return None
            for ids in _encode(group, spec, tokenizer):
                block = np.asarray(ids, dtype=dtype).tobytes()
                file.write(block)
                sha256.update(block)
                tokens += len(ids)
            if time.monotonic() > reported + _SECONDS_BETWEEN_REPORTS:
                making.emit(Preparing(step=0, what="tokenising the dataset", done=tokens))
                reported = time.monotonic()
        file.flush()
        os.fsync(file.fileno())
    check_length(tokens, spec)
    return {"tokens": tokens, "dtype": np.dtype(dtype).name, "sha256": sha256.hexdigest()}


def _stream(spec: TrainingSpec) -> Stream:
    assert isinstance(spec.dataset, Stream), "other tasks have other data"
    return spec.dataset


def _encode(texts: list[str], spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if spec.tokenizer == "bytes":
        # The same ids as the tokeniser's own, without its detour through characters.
        yield from ([*text.encode(), *end] for text in texts)
    else:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from ([*ids, *end] for ids in encoded["input_ids"])


class Sequences:
    """The prepared stream of a run, on one rank: the `Task` of pre-training."""

    def __init__(self, spec: TrainingSpec, directory: Path, rank: int, device: torch.device) -> None:
        meta = json.loads((directory / META).read_text())
        try:
            tokens = np.memmap(directory / TOKENS, dtype=meta["dtype"], mode="r", shape=(meta["tokens"],))
        except ValueError as error:
            raise DataError(f"dataset: {directory / 'tokens.bin'} is shorter than meta.json says: {error}") from error
        length = spec.dataset.sequence_length
        self.training, self.validation = check_length(meta["tokens"], spec)
        whole = self.training + self.validation
        self._sequences = tokens[: whole * length].reshape(whole, length)
        self._spec, self._rank, self._device = spec, rank, device
        self._order = Order(spec.optimisation.seed, self.training)
        self.training_tokens = self.training * length
        self.tokens_per_step = spec.optimisation.global_batch * length

    def tokens_before(self, step: int) -> int:
        return self._spec.batches_before(step) * self.tokens_per_step

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of what `step` (0-based) averages: each (micro_batch, sequence_length), int64.

        One global batch, or the several of a large switch (GoLore's ℬ).
        """
        optimisation, ranks = self._spec.optimisation, self._spec.resources.ranks
        micro = optimisation.micro_batch
        assert micro is not None
        first, end = (self._spec.batches_before(t) * optimisation.global_batch for t in (step, step + 1))
        starts = range(first + self._rank * micro, end, micro * ranks)
        return [Batch.of_tokens(self.load([self._order[start + j] for j in range(micro)])) for start in starts]

    def validation_batches(self) -> list[list[int]]:
        """Rows of the held-out sequences that an evaluation uses, in batches of micro_batch. Equal on all ranks."""
        count = min(self.validation, self._spec.optimisation.evaluation_sequences)
        rows = range(self.training, self.training + count)
        return list(groups(rows, self._spec.optimisation.micro_batch or 1))

    def load(self, rows: list[int]) -> Tensor:
        """(len(rows), sequence_length), int64, on the device."""
        return torch.from_numpy(self._sequences[rows].astype(np.int64)).to(self._device)

    def check(self, model: Any) -> None:
        # Presets are known.
        if not isinstance(self._spec.model, PresetModel):
            check_causal(model, self._spec.dataset.sequence_length, self._device)

    def evaluate(self, model: Any) -> Measured | None:
        batches = self.validation_batches()
        if not batches:
            return None

        def figures(rows: list[int]) -> tuple[float, float]:
            return float(model(**Batch.of_tokens(self.load(rows)).inputs).loss) * len(rows), len(rows)

        losses, count = heldout.totals(batches, figures, self._device)
        return Measured(losses / count, int(count))
