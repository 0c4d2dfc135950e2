"""The files of tokenised examples, one after the other: written once into a run's data directory, read by every rank.

    tokens.bin   ids of all examples
    marks.bin    a byte for each of them: for a causal model 1 where the token's prediction is learnt, for a classifier
                 the segment that the token belongs to
    index.npy    for each example its offset and length, how many of its marks are not 0, its length before truncation,
                 and a number of its own (a label)

The examples of validation_files follow those of files. Which of the others are held out is cut later (`training_of`).
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from trainer import events
from trainer.config import held_out
from trainer.datasetconfig import Examples
from trainer.errors import DataError
from trainer.rundir import META, TOKENS

MARKS, INDEX = "marks.bin", "index.npy"
_ROW = np.dtype([("offset", "<i8"), ("length", "<i8"), ("marked", "<i8"), ("whole", "<i8"), ("value", "<f8")])
Array = np.ndarray[Any, np.dtype[Any]]


class Writer:
    """Examples into files. `vocabulary`: the tokeniser's size. Use as a context; `finish` makes them lasting."""

    def __init__(self, directory: Path, vocabulary: int) -> None:
        self.tokens = 0
        self._directory = directory
        self._dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
        self._rows: list[tuple[int, int, int, int, float]] = []
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> "Writer":
        self._files = ExitStack()
        self._tokens = self._files.enter_context((self._directory / TOKENS).open("wb"))
        self._marks = self._files.enter_context((self._directory / MARKS).open("wb"))
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, ids: Sequence[int], marks: Sequence[int], whole: int | None = None, value: float = 0.0) -> None:
        """`whole`: the length before truncation, where that is another one."""
        tokens, marked = np.asarray(ids, dtype=self._dtype), np.asarray(marks, dtype=np.uint8)
        assert tokens.shape == marked.shape and len(tokens), "an example has a token, and a mark for each"
        for file, block in (self._tokens, tokens.tobytes()), (self._marks, marked.tobytes()):
            file.write(block)
            self._sha256.update(block)
        self._rows.append((self.tokens, len(ids), int(np.count_nonzero(marked)), whole or len(ids), value))
        self.tokens += len(ids)

    def finish(self) -> dict[str, Any]:
        """What meta.json has to say of the files."""
        index = np.array(self._rows, dtype=_ROW)
        self._sha256.update(index.tobytes())
        with (self._directory / INDEX).open("wb") as file:
            np.save(file, index)
            for written in (file, self._tokens, self._marks):
                written.flush()
                os.fsync(written.fileno())
        return {"tokens": self.tokens, "dtype": self._dtype.name, "sha256": self._sha256.hexdigest()}


class Prepared:
    """The same, read. `lengths`, `marked`, `wholes` and `values` are arrays with an entry for each example."""

    def __init__(self, directory: Path, meta: dict[str, Any]) -> None:
        index = np.load(directory / INDEX, mmap_mode="r")
        self.lengths: Array = index["length"]
        self.marked: Array = index["marked"]
        self.wholes: Array = index["whole"]
        self.values: Array = index["value"]
        self._offsets: Array = index["offset"]
        shape = (meta["tokens"],)
        try:
            self._tokens = np.memmap(directory / TOKENS, dtype=meta["dtype"], mode="r", shape=shape)
            self._marks = np.memmap(directory / MARKS, dtype=np.uint8, mode="r", shape=shape)
        except ValueError as error:
            raise DataError(f"dataset: the files in {directory} are shorter than {META} says: {error}") from error

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> tuple[Array, Array]:
        """(ids, marks) of an example, int64."""
        part = slice(int(self._offsets[number]), int(self._offsets[number] + self.lengths[number]))
        return self._tokens[part].astype(np.int64), self._marks[part].astype(np.int64)


def training_of(dataset: Examples, of_files: int, of_validation_files: int) -> tuple[range, range]:
    """(examples to train on, examples held out), by their place: the last ones of files, or all of validation_files."""
    held = held_out(of_files, dataset.validation_fraction)
    if of_validation_files:
        return range(of_files), range(of_files, of_files + of_validation_files)
    return range(of_files - held), range(of_files - held, of_files)


def summary(dataset: Examples, directory: Path) -> events.Prepared:
    """What is told of the files. As learnt count the tokens whose mark is not 0."""
    meta = json.loads((directory / META).read_text())
    found = Prepared(directory, meta)
    training, held = training_of(dataset, meta["examples"], meta["validation"])
    part = slice(training.start, training.stop)
    return events.Prepared(
        step=0,
        examples=len(training),
        held_out=len(held),
        left_out=meta.get("left_out", 0),
        truncated=meta["truncated"],
        tokens=int(found.lengths[part].sum()),
        trained_tokens=int(found.marked[part].sum()),
        longest=meta["longest"],
        median=int(np.median(found.wholes[part])),
    )
