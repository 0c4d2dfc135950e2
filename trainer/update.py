"""One step of training: the method's moments around the engine's. The same for every method, engine and model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainer.batch import Batch
from trainer.lowrank.switch import SwitchReport
from trainer.methods.base import Method, StepContext
from trainer.zero import Shards


@dataclass(frozen=True)
class Update:
    """What a step found on this rank: its part of the step's loss, whose mean over the ranks is the whole; η as it was,
    the norm of the whole gradient, what switches report; how many of how many targets were right, where batches count.
    """

    loss: float
    rate: float
    gradient_norm: float
    reports: list[SwitchReport]
    right: float = 0.0
    targets: int = 0


def update(
    engine: Any,
    method: Method,
    shards: Shards,
    step: int,
    rate: float,
    micro_batches: list[Batch],
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
    right = torch.zeros((), dtype=torch.float64, device=engine.device)
    norm = 0.0
    # The engine divides every loss by the micro-batches of its largest step.
    share = engine.gradient_accumulation_steps() / len(micro_batches)
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        engine.set_gradient_accumulation_boundary(last)
        output = engine(**batch.inputs)
        method.after_forward(context)
        loss = batch.weighted(output.loss)
        if batch.right is not None:
            right += batch.right(output).double()
        del output  # logits are large
        engine.backward(loss if share == 1 else loss * share)
        loss_sum += loss.detach().double()
        if shards.norm_is_known_before_step and last:
            norm = shards.gradient_norm()
        engine.step()
    if not shards.norm_is_known_before_step:
        norm = shards.gradient_norm()
    after = method.after_step(context)
    reports = [report for report in (before, after) if report]
    targets = sum(batch.targets for batch in micro_batches)
    return Update(float(loss_sum) / len(micro_batches), eta, norm, reports, float(right), targets)
