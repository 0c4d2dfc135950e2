"""Fine-tuning, trained: whatever the packing, the micro-batches and the model, it is the plain loop over examples."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.finetune import made
from trainer import events

pytestmark = pytest.mark.usefixtures("process_group")


def losses(told: list[events.Event]) -> list[float]:
    return [event.loss for event in told if isinstance(event, events.Step)]


def trained(directory: Path, name: str, steps: int = 4, **changes: Any) -> list[float]:
    run, told = made.run(directory, name, **changes)
    while run.step < steps:
        run.train_step(lambda: False)
    return losses(told)


def test_first(tmp_path: Path) -> None:
    print(trained(tmp_path, "a"))
    print(trained(tmp_path, "b", dataset={"packing": False}))
    print(trained(tmp_path, "c", optimisation={"micro_batch": 1}))
