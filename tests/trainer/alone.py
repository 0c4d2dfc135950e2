"""Runs of one process, for tests that need an engine but not several ranks. Use the fixture `process_group`."""

from pathlib import Path
from typing import Any

from tests.distributed.case import spec
from trainer import events
from trainer.config import TrainingSpec
from trainer.prepare import prepare
from trainer.run import Run
from trainer.rundir import RunDir


def alone(directory: Path, **changes: Any) -> TrainingSpec:
    return spec(directory, **({"resources": {"processes": 1}} | changes))


def make_run(directory: Path, **changes: Any) -> tuple[Run, list[events.Event]]:
    found: list[events.Event] = []
    rundir = RunDir(directory / "run")
    wanted = alone(directory, **changes)
    prepare(wanted, rundir, 0, found.append, lambda: False)
    return Run(wanted, rundir, found.append), found
