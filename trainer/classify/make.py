"""The files of a classification: every example tokenised once, as its tokeniser wants one text or two, cut to length.

Truncation is the tokeniser's longest_first: of a pair the longer one loses its end first, and what the tokeniser adds
(a beginning, separators) stays. A token's mark is its segment (`token_type_ids`), where the tokeniser gives any; an
example's value is its label.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer import durable
from trainer.classify.files import each_labelled
from trainer.classify.labels import dataset_of, file_of, in_order, place_of
from trainer.config import TrainingSpec
from trainer.datasetconfig import LabelledDataset
from trainer.errors import DataError, SpecError
from trainer.events import Event, Preparing
from trainer.examplefiles import Place
from trainer.examples import Labelled
from trainer.order import groups
from trainer.prepared import Writer, summary
from trainer.task import Making

_WHAT = "tokenising the examples"
_FIELDS = ("files", "validation_files")
_EXAMPLES_AT_ONCE = 256
_SECONDS_BETWEEN_REPORTS = 2.0


def make(making: Making) -> dict[str, Any] | None:
    """What meta.json says of the examples; None when a stop was requested.

    Raises DataError that names the file and the line of what cannot be used, SpecError where spec and files disagree.
    """
    dataset, tokenizer = dataset_of(making.spec), making.tokenizer
    making.emit(Preparing(step=0, what=_WHAT))
    set_padding(tokenizer)
    labels = _labels(dataset)
    count = dict.fromkeys(_FIELDS, 0)
    truncated, longest, reported = 0, 0, time.monotonic()
    with Writer(making.rundir.data, len(tokenizer)) as writer:
        for field in _FIELDS:
            for group in groups(each_labelled(dataset, field), _EXAMPLES_AT_ONCE):
                if making.stop_requested():
                    return None
                values = [value_of(place, example.label, labels) for place, example in group]
                encoded = encode(tokenizer, group, dataset.sequence_length)
                for (ids, segments, whole), value in zip(encoded, values, strict=True):
                    writer.add(ids, segments, whole, value)
                    truncated += whole > len(ids)
                    longest = max(longest, whole)
                count[field] += len(group)
                if time.monotonic() > reported + _SECONDS_BETWEEN_REPORTS:
                    making.emit(Preparing(step=0, what=_WHAT, done=writer.tokens))
                    reported = time.monotonic()
        _check(dataset, count)
        facts = writer.finish()
    if labels is not None:
        durable.write(file_of(making.rundir), json.dumps(labels).encode())
    counts = {"examples": count["files"], "validation": count["validation_files"]}
    return facts | counts | {"truncated": truncated, "longest": longest}


def set_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokeniser that has no padding token pads with its end of a text. Raises SpecError where it has neither."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SpecError(
                "tokenizer: has neither a padding nor an end-of-text token, so examples of different lengths make no "
                "batch; set its pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token


def _labels(dataset: LabelledDataset) -> tuple[str, ...] | None:
    """None for a regression."""
    if dataset.kind == "number" or dataset.labels:
        return dataset.labels
    found: set[str] = set()
    for field in _FIELDS:
        for place, example in each_labelled(dataset, field):
            found.add(_stated(place, example.label))
    if len(found) < 2:
        raise DataError(f"dataset.files: hold {len(found)} labels ({', '.join(found)}); a classifier needs two or more")
    if len(found) > 1000:
        raise DataError(
            f"dataset.files: hold {len(found)} different labels; a classifier has at most 1000. If they are "
            "measurements, set dataset.kind to number"
        )
    return in_order(found)


def value_of(place: Place, label: str | None, labels: tuple[str, ...] | None) -> float:
    """A class's place in the list, or the number of a regression. Raises DataError."""
    stated = _stated(place, label)
    if labels is None:
        try:
            number = float(stated)
        except ValueError:
            number = float("nan")
        if not np.isfinite(number):
            raise place.wrong(f"label {stated!r} is no number; correct it, or set dataset.kind to classes")
        return number
    found = place_of(stated, labels)
    if found is None:
        raise place.wrong(f"label {stated!r} is none of {', '.join(labels)}; correct it, or dataset.labels")
    return float(found)


def _stated(place: Place, label: str | None) -> str:
    if label is None:
        raise place.wrong("label is missing")
    return label


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[Place, Labelled]], limit: int
) -> Iterator[tuple[list[int], list[int], int]]:
    """(ids, segments, tokens before truncation) of each."""
    for place, example in examples:
        ids, segments = _encoded(tokenizer, example, limit)
        if not ids:
            raise place.wrong("has no token; the tokeniser makes none of its text")
        # Only what fills the row can have been cut.
        whole = len(_encoded(tokenizer, example, None)[0]) if len(ids) >= limit else len(ids)
        yield ids, segments, whole


def _encoded(tokenizer: PreTrainedTokenizerBase, example: Labelled, limit: int | None) -> tuple[list[int], list[int]]:
    found = tokenizer(
        example.text,
        example.pair,
        truncation="longest_first" if limit else False,
        max_length=limit,
        verbose=False,
    )
    ids: list[int] = found["input_ids"]
    return ids, list(found.get("token_type_ids") or [0] * len(ids))


def _check(dataset: LabelledDataset, count: dict[str, int]) -> None:
    # Rows of MNLI without a label are passed over here, and counted where a file is uploaded.
    passed_over = dataset.glue == "mnli" and dataset.examples is not None and count["files"] < dataset.examples
    if dataset.examples not in (None, count["files"]) and not passed_over:
        raise SpecError(
            f"dataset.examples: {dataset.examples} is given, but the files hold {count['files']}; correct it"
        )
    for field in _FIELDS:
        if getattr(dataset, field) and not count[field]:
            raise DataError(f"dataset.{field}: the files have no example to use: they are empty")
    if count["files"] == 1 and dataset.validation_fraction:
        raise DataError("dataset.validation_fraction: of one example none can be held out; give more, or 0")


def tell(spec: TrainingSpec, directory: Path) -> Iterator[Event]:
    found = summary(dataset_of(spec), directory)
    # Marks are segments here; what is learnt of an example is its label.
    yield found.model_copy(update={"trained_tokens": found.examples})
