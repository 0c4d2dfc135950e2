"""One step of training: the method's moments around the engine's. The same for every method, engine and model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainer.lowrank.switch import SwitchReport
from trainer.methods.base import Method, StepContext
from trainer.zero import Shards


@dataclass(frozen=True)
class Update:
    """What a step found on this rank: the mean loss of its micro-batches, η as it was, the norm of the whole gradient,
    what switches report."""

    loss: float
    rate: float
    gradient_norm: float
    reports: list[SwitchReport]


def update(
    engine: Any,
    method: Method,
    shards: Shards,
    step: int,
    rate: float,
    micro_batches: list[torch.Tensor],
    reseed: Callable[[], None] = lambda: None,
) -> Update:
    """Make the 0-based `step` at the schedule's `rate`. Collective.

    `reseed` is called before each pass over the micro-batches: the training pass shall drop out what the probe dropped.
    """
    eta = rate * method.rate_factor(step)
    context = StepContext(step, eta, engine.module, shards, micro_batches)
    reseed()
    before = method.before_step(context)
    for group in shards.parameter_groups:
        group["lr"] = eta * group["rate"]
    reseed()
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    norm = 0.0
    # The engine divides every loss by the micro-batches of its largest step.
    weight = engine.gradient_accumulation_steps() / len(micro_batches)
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        engine.set_gradient_accumulation_boundary(last)
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss if weight == 1 else loss * weight)
        loss_sum += loss.detach().double()
        if shards.norm_is_known_before_step and last:
            norm = shards.gradient_norm()
        engine.step()
    if not shards.norm_is_known_before_step:
        norm = shards.gradient_norm()
    after = method.after_step(context)
    return Update(float(loss_sum) / len(micro_batches), eta, norm, [report for report in (before, after) if report])
