"""From documents to batches: tokenised once into one flat file, cut into sequences, visited in a seeded order.

The order is a pure function: sequence j of step t is the same whatever the number of ranks, and the cursor of a resumed
run is its step.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer.config import TrainingSpec
from trainer.documents import documents
from trainer.errors import DataError
from trainer.preflight import check_length

_DOCUMENTS_AT_ONCE = 256
Item = TypeVar("Item")


def prepare(
    spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase, directory: Path, report: Callable[[int], None]
) -> None:
    """Tokenise the dataset into `directory`, unless it is there already. One process only.

    `report` is told the number of tokens written, now and then. Raises DataError when there are too few.
    """
    if (directory / "meta.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    tokens = 0
    with (directory / "tokens.bin").open("wb") as file:
        for group in _groups(documents(spec.dataset), _DOCUMENTS_AT_ONCE):
            for ids in _encode(group, spec, tokenizer):
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                tokens += len(ids)
            report(tokens)
        file.flush()
        os.fsync(file.fileno())
    check_length(tokens, spec)
    meta = {"tokens": tokens, "dtype": np.dtype(dtype).name}
    unfinished = directory / "meta.json.tmp"
    unfinished.write_text(json.dumps(meta))
    unfinished.rename(directory / "meta.json")


def _encode(texts: list[str], spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if spec.tokenizer == "bytes":
        # The same ids as the tokeniser's own, a hundred times faster.
        yield from ([*text.encode(), *end] for text in texts)
    else:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from ([*ids, *end] for ids in encoded["input_ids"])


class Sequences:
    """The prepared dataset of a run, on one rank."""

    def __init__(self, spec: TrainingSpec, directory: Path, rank: int, device: torch.device) -> None:
        meta = json.loads((directory / "meta.json").read_text())
        try:
            tokens = np.memmap(directory / "tokens.bin", dtype=meta["dtype"], mode="r", shape=(meta["tokens"],))
        except ValueError as error:
            raise DataError(f"dataset: {directory / 'tokens.bin'} is shorter than meta.json says: {error}") from error
        length = spec.dataset.sequence_length
        self.training, self.validation = check_length(meta["tokens"], spec)
        whole = self.training + self.validation
        self._sequences = tokens[: whole * length].reshape(whole, length)
        self._spec, self._rank, self._device = spec, rank, device
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def micro_batches(self, step: int) -> list[Tensor]:
        """This rank's part of the global batch of `step` (0-based): each (micro_batch, sequence_length), int64."""
        optimisation, processes = self._spec.optimisation, self._spec.resources.processes
        micro = optimisation.micro_batch
        assert micro is not None
        first = step * optimisation.global_batch
        starts = range(first + self._rank * micro, first + optimisation.global_batch, micro * processes)
        return [self.load([self._shuffled(start + j) for j in range(micro)]) for start in starts]

    def validation_batches(self) -> list[list[int]]:
        """Rows of the held-out sequences that an evaluation uses, in batches of micro_batch. Equal on all ranks."""
        count = min(self.validation, self._spec.optimisation.evaluation_sequences)
        rows = range(self.training, self.training + count)
        return list(_groups(rows, self._spec.optimisation.micro_batch or 1))

    def load(self, rows: list[int]) -> Tensor:
        """(len(rows), sequence_length), int64, on the device."""
        return torch.from_numpy(self._sequences[rows].astype(np.int64)).to(self._device)

    def _shuffled(self, index: int) -> int:
        """The row of the index-th sequence of the run: a new permutation every epoch."""
        epoch, position = divmod(index, self.training)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self._spec.optimisation.seed, epoch]))
            self._epoch, self._order = epoch, generator.permutation(self.training)
        return int(self._order[position])


def _groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one perhaps shorter."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
