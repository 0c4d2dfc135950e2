"""The files of a fine-tuning: every example tokenised once, cut to length, marked. See `trainer.prepared`."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import TrainingSpec
from trainer.datasetconfig import ExamplesDataset
from trainer.errors import DataError, SpecError
from trainer.events import Event, Preparing
from trainer.examplefiles import each_example
from trainer.examples import BadExample, Chat
from trainer.finetune.tokens import Encoder, cut
from trainer.prepared import Writer, summary
from trainer.task import Making

_WHAT = "tokenising the examples"
_SECONDS_BETWEEN_REPORTS = 2.0


def dataset_of(spec: TrainingSpec) -> ExamplesDataset:
    assert isinstance(spec.dataset, ExamplesDataset), "other tasks have other data"
    return spec.dataset


def make(making: Making) -> dict[str, Any] | None:
    """What meta.json says of the examples; None when a stop was requested.

    Raises DataError that names the file and the line of what cannot be used, and where nothing is left to learn.
    """
    dataset, limit = dataset_of(making.spec), making.spec.dataset.sequence_length
    making.emit(Preparing(step=0, what=_WHAT))
    encoder = Encoder(making.tokenizer, dataset)
    read = {"files": 0, "validation_files": 0}
    usable = dict(read)
    left_out, truncated, longest, chats, reported = 0, 0, 0, False, time.monotonic()
    with Writer(making.rundir.data, len(making.tokenizer)) as writer:
        for field in read:
            for place, example in each_example(dataset, field, dataset.format):
                if making.stop_requested():
                    return None
                read[field] += 1
                chats = chats or isinstance(example, Chat)
                try:
                    whole = encoder.encode(example)
                except BadExample as error:
                    raise place.wrong(error.reason) from error
                length = len(whole.ids)
                if length > limit and dataset.truncation == "refuse":
                    raise place.wrong(
                        f"has {length} tokens, and dataset.sequence_length is {limit}; raise it, shorten the example, "
                        "or let truncation be end, start or drop"
                    )
                longest = max(longest, length)
                tokens = cut(whole, limit, dataset.truncation)
                if tokens is None or not tokens.learns:
                    left_out += 1
                    continue
                truncated += length > limit
                writer.add(tokens.ids, tokens.marks, length)
                usable[field] += 1
                if time.monotonic() > reported + _SECONDS_BETWEEN_REPORTS:
                    making.emit(Preparing(step=0, what=_WHAT, done=writer.tokens))
                    reported = time.monotonic()
        _check(dataset, read, usable, longest)
        facts = writer.finish()
    if chats or dataset.chat_template:
        making.tokenizer.chat_template = encoder.template
    counts = {"left_out": left_out, "truncated": truncated, "longest": longest}
    return facts | counts | {"examples": usable["files"], "validation": usable["validation_files"]}


def _check(dataset: ExamplesDataset, read: dict[str, int], usable: dict[str, int], longest: int) -> None:
    if dataset.examples not in (None, read["files"]):
        raise SpecError(
            f"dataset.examples: {dataset.examples} is given, but the files hold {read['files']}; correct it"
        )
    for field, count in read.items():
        if getattr(dataset, field) and not usable[field]:
            why = (
                f"none of their {count} keeps a token to learn within sequence_length {dataset.sequence_length}; the "
                f"longest has {longest} tokens, truncation is {dataset.truncation}. Raise sequence_length, choose "
                "another truncation, or train_on all"
            )
            why = why if count else "they are empty"
            raise DataError(f"dataset.{field}: the files have no example to use: {why}")
    if usable["files"] == 1 and dataset.validation_fraction:
        raise DataError("dataset.validation_fraction: of one example none can be held out; give more, or 0")


def tell(spec: TrainingSpec, directory: Path) -> Iterator[Event]:
    yield summary(dataset_of(spec), directory)
