"""The tasks by name: how the data of each is made, read by a rank, and told of. See `trainer.task`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer import data
from trainer.classify import make as labelled
from trainer.classify.task import LabelTask
from trainer.config import TrainingSpec
from trainer.events import Event
from trainer.finetune import make
from trainer.finetune.task import ExampleTask
from trainer.task import Make, Task


def _nothing(spec: TrainingSpec, directory: Path) -> Iterable[Event]:
    return []


@dataclass(frozen=True)
class Kind:
    make: Make
    # (spec, the run's data directory, rank, device)
    open: Callable[[TrainingSpec, Path, int, torch.device], Task]
    # Settings of the dataset that matter only once its files are made.
    later: set[str]
    # What is told when the files are there, by the first rank.
    tell: Callable[[TrainingSpec, Path], Iterable[Event]] = _nothing


TASKS: dict[str, Kind] = {
    "pretrain": Kind(data.tokenise, data.Sequences, later={"sequence_length", "validation_fraction"}),
    "finetune": Kind(
        make.make,
        ExampleTask,
        later={"validation_fraction", "packing", "examples", "samples", "sample_tokens"},
        tell=make.tell,
    ),
    "classify": Kind(labelled.make, LabelTask, later={"validation_fraction", "examples", "metric"}, tell=labelled.tell),
}
