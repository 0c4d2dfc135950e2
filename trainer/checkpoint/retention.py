"""Which checkpoints are kept. Imports no torch: the API answers by the same rule."""

from collections.abc import Mapping

from trainer.config import CheckpointSpec


def kept(losses: Mapping[int, float | None], wanted: CheckpointSpec) -> set[int]:
    """Of the steps in `losses` (held-out loss, where one is known) the newest, and the one with the lowest loss."""
    remaining = set(sorted(losses)[-wanted.keep :])
    known = {step: loss for step, loss in losses.items() if loss is not None}
    if wanted.keep_best and known:
        # Of equal losses the later.
        remaining.add(min(known, key=lambda step: (known[step], -step)))
    return remaining
