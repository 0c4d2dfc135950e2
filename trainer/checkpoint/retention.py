"""Which checkpoints are kept. Imports no torch: the API answers by the same rule.

Besides, some may be held: others start from them. Which ones a run's supervisor says in the run directory, wherever the
checkpoints lie, and the trainer looks there each time before it removes any.
"""

import json
from collections.abc import Iterable, Mapping

from trainer import durable
from trainer.config import CheckpointSpec
from trainer.rundir import RunDir


def kept(losses: Mapping[int, float | None], wanted: CheckpointSpec) -> set[int]:
    """Of the steps in `losses` (held-out loss, where one is known) the newest, and the one with the lowest loss."""
    remaining = set(sorted(losses)[-wanted.keep :])
    known = {step: loss for step, loss in losses.items() if loss is not None}
    if wanted.keep_best and known:
        # Of equal losses the later.
        remaining.add(min(known, key=lambda step: (known[step], -step)))
    return remaining


def hold(rundir: RunDir, steps: Iterable[int]) -> None:
    """These, and no others, from now on."""
    durable.write(rundir.held, json.dumps(sorted(steps)).encode())


def held(rundir: RunDir) -> set[int]:
    """Raises OSError and ValueError where it cannot be known."""
    try:
        return set(json.loads(rundir.held.read_text()))
    except FileNotFoundError:
        return set()
