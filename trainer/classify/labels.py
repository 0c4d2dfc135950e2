"""The names of a classifier's classes. Imports no torch.

A label is a name, or a name's place in the list from 0, as the hub's files of GLUE have it; not where names are numbers
themselves, since 0 would be another word for 1. Names that nobody has given are those found in the files, sorted:
numbers by their size, all else as text. They are kept beside the run's data, in labels.json, for whoever resumes or
exports it.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from trainer.config import TrainingSpec
from trainer.datasetconfig import LabelledDataset
from trainer.rundir import RunDir

LABELS = "labels.json"


def dataset_of(spec: TrainingSpec) -> LabelledDataset:
    assert isinstance(spec.dataset, LabelledDataset), "other tasks have other data"
    return spec.dataset


def in_order(found: Iterable[str]) -> tuple[str, ...]:
    names = set(found)
    whole_numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int) if whole_numbers else sorted(names))


def place_of(label: str, labels: tuple[str, ...]) -> int | None:
    """None for what is no label."""
    if label in labels:
        return labels.index(label)
    if not label.isdecimal() or any(name.isdecimal() for name in labels):
        return None
    return int(label) if int(label) < len(labels) else None


def file_of(rundir: RunDir) -> Path:
    return rundir.root / LABELS


def completed(spec: TrainingSpec, rundir: RunDir) -> TrainingSpec:
    """With the labels that were found, where none were given; once the run's data is made."""
    if spec.task != "classify" or dataset_of(spec).kind == "number" or dataset_of(spec).labels:
        return spec
    labels = tuple(json.loads(file_of(rundir).read_text()))
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"labels": labels})})
