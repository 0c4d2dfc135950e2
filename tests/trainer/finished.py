"""Runs of a few steps with a checkpoint, for what is done with a run afterwards. Use the fixture `process_group`."""

from pathlib import Path
from typing import Any

import torch

from tests.trainer.alone import make_run
from trainer import events
from trainer.run import Run
from trainer.rundir import RunDir


def finished(directory: Path, steps: int = 5, **changes: Any) -> tuple[Run, RunDir, list[float]]:
    """(the run, its directory as the command wants it, held-out losses before the first and after the last step)."""
    run, found = make_run(directory, **changes)
    run.evaluate()
    while run.step < steps:
        run.train_step(lambda: False)
    run.save(run.evaluate())
    rundir = RunDir(directory / "run")
    rundir.spec.write_text(run.spec.model_dump_json())
    return run, rundir, [e.loss for e in found if isinstance(e, events.Evaluated)]


def loss_of(model: Any, run: Run) -> float:
    """On the run's held-out sequences, as `Run.evaluate` has it."""
    losses, count = 0.0, 0
    with torch.no_grad():
        for rows in run.task.validation_batches():
            tokens = run.task.load(rows)
            losses += float(model(input_ids=tokens, labels=tokens).loss) * len(rows)
            count += len(rows)
    return losses / count


def logits_of(model: Any, run: Run) -> torch.Tensor:
    """On the first of the run's held-out sequences."""
    tokens = run.task.load(run.task.validation_batches()[0])
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits
