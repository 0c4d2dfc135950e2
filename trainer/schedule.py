"""The learning rate as a pure function of the step. Imports no torch."""

import math

from trainer.config import Optimisation


def learning_rate(step: int, optimisation: Optimisation) -> float:
    """η of the update that makes `step` (1-based): linear warm-up, then cosine from the peak to the floor.

    The first update after w warm-up steps has the peak rate; the last step has the floor.
    """
    assert optimisation.steps is not None and optimisation.warmup_steps is not None
    assert optimisation.learning_rate is not None
    peak, steps, warmup = optimisation.learning_rate, optimisation.steps, optimisation.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    floor = optimisation.final_rate_ratio
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
