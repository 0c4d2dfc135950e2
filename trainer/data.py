"""From documents to batches: tokenised once into one flat file, cut into sequences, visited in a seeded order.

The order is a pure function: sequence j of step t is the same whatever the number of ranks, and the cursor of a resumed
run is its step.
"""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer import durable
from trainer.batch import Batch
from trainer.config import TrainingSpec
from trainer.datasetconfig import Stream
from trainer.documents import documents
from trainer.errors import DataError, SpecError
from trainer.events import Event, Preparing
from trainer.preflight import check_length
from trainer.rundir import RunDir
from trainer.tokenizer import load_tokenizer, save_tokenizer

_TOKENS, _META = "tokens.bin", "meta.json"
_DOCUMENTS_AT_ONCE = 256
_SECONDS_BETWEEN_REPORTS = 2.0
_SECONDS_BETWEEN_LOOKS = 0.2
Item = TypeVar("Item")


def prepare(
    spec: TrainingSpec,
    rundir: RunDir,
    local_rank: int,
    emit: Callable[[Event], None],
    stop_requested: Callable[[], bool],
) -> bool:
    """Tokenise the dataset into the run directory, unless it is there already. False when a stop was requested.

    The first rank of each host works, one host at a time: where they share the run directory, the others find it done.
    A host's other ranks look for the result, without a collective that could time out. (If the first fails, the
    launcher ends them.) Raises DataError when there are too few tokens, SpecError when what is there was made from
    another dataset or by another tokeniser.
    """
    # Named after the launcher, so that nobody takes an earlier attempt's for this one's.
    stopped = rundir.data / f"stopped-{socket.gethostname()}-{os.getppid()}"
    if local_rank != 0:
        while not (rundir.data / _META).exists():
            if stopped.exists():
                return False
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return True
    rundir.data.mkdir(parents=True, exist_ok=True)
    with _alone(rundir.data_lock, stop_requested) as alone:
        if (rundir.data / _META).exists():
            _check_same(spec, rundir)
            return True
        if alone and _tokenise(spec, rundir, emit, stop_requested):
            return True
    stopped.touch()
    return False


@contextmanager
def _alone(lock: Path, stop_requested: Callable[[], bool]) -> Iterator[bool]:
    """Hold `lock`; False when a stop was requested while somebody else held it. A killed holder has let go of it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        held = _try_lock(descriptor)
        while not held and not stop_requested():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            held = _try_lock(descriptor)
        yield held
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tokenise(
    spec: TrainingSpec, rundir: RunDir, emit: Callable[[Event], None], stop_requested: Callable[[], bool]
) -> bool:
    """False when a stop was requested, and nothing is there."""
    emit(Preparing(step=0, what="tokenising the dataset"))
    tokenizer = load_tokenizer(spec.tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    tokens, sha256, reported = 0, hashlib.sha256(), time.monotonic()
    with (rundir.data / _TOKENS).open("wb") as file:
        for group in _groups(documents(_stream(spec)), _DOCUMENTS_AT_ONCE):
            if stop_requested():
                return False
            for ids in _encode(group, spec, tokenizer):
                block = np.asarray(ids, dtype=dtype).tobytes()
                file.write(block)
                sha256.update(block)
                tokens += len(ids)
            if time.monotonic() > reported + _SECONDS_BETWEEN_REPORTS:
                emit(Preparing(step=0, what="tokenising the dataset", done=tokens))
                reported = time.monotonic()
        file.flush()
        os.fsync(file.fileno())
    check_length(tokens, spec)
    save_tokenizer(tokenizer, rundir.tokenizer)
    for path in [*rundir.tokenizer.iterdir(), rundir.tokenizer, rundir.root]:
        durable.sync(path)
    meta = {
        "tokens": tokens,
        "dtype": np.dtype(dtype).name,
        "sha256": sha256.hexdigest(),
        "made_from": _made_from(spec),
    }
    # Last: who finds it takes all that it speaks of for whole.
    durable.write(rundir.data / _META, json.dumps(meta).encode())
    return True


def digest(rundir: RunDir) -> str:
    """Of the prepared tokens: equal on hosts that read the same files with the same tokeniser."""
    meta = json.loads((rundir.data / _META).read_text())
    return str(meta.get("sha256", meta["tokens"]))  # without: made before it was stored


def _made_from(spec: TrainingSpec) -> dict[str, Any]:
    """What the tokens depend on: how they are cut into sequences may change between two attempts, this may not."""
    cut = {"sequence_length", "validation_fraction"}
    return {"dataset": spec.dataset.model_dump(mode="json", exclude=cut), "tokenizer": spec.tokenizer}


def _check_same(spec: TrainingSpec, rundir: RunDir) -> None:
    made_from = json.loads((rundir.data / _META).read_text())["made_from"]
    for field, wanted in _made_from(spec).items():
        if made_from[field] != wanted:
            raise SpecError(
                f"{field}: {rundir.data} was made from {made_from[field]}, not {wanted}; "
                "train in another run directory, or delete its data and checkpoints"
            )


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
    """The prepared dataset of a run, on one rank."""

    def __init__(self, spec: TrainingSpec, directory: Path, rank: int, device: torch.device) -> None:
        meta = json.loads((directory / _META).read_text())
        try:
            tokens = np.memmap(directory / _TOKENS, dtype=meta["dtype"], mode="r", shape=(meta["tokens"],))
        except ValueError as error:
            raise DataError(f"dataset: {directory / 'tokens.bin'} is shorter than meta.json says: {error}") from error
        length = spec.dataset.sequence_length
        self.training, self.validation = check_length(meta["tokens"], spec)
        whole = self.training + self.validation
        self._sequences = tokens[: whole * length].reshape(whole, length)
        self._spec, self._rank, self._device = spec, rank, device
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of what `step` (0-based) averages: each (micro_batch, sequence_length), int64.

        One global batch, or the several of a large switch (GoLore's ℬ).
        """
        optimisation, ranks = self._spec.optimisation, self._spec.resources.ranks
        micro = optimisation.micro_batch
        assert micro is not None
        first, end = (self._spec.batches_before(t) * optimisation.global_batch for t in (step, step + 1))
        starts = range(first + self._rank * micro, end, micro * ranks)
        return [Batch.of_tokens(self.load([self._shuffled(start + j) for j in range(micro)])) for start in starts]

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
