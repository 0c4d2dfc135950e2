"""The change of subspace: choose, merge, install.

    W ← W + Δ/s,   core ← 0,   subspace ← the new one

W_eff, and so the loss, is the same before and after, to rounding. It happens before the step's forward pass, so that
the step's own gradient is the first one to be seen through the new subspace.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.zero import Shards


class Switching(Protocol):
    """What a layer offers whose subspace is chosen: a basis, or a set of entries."""

    name: str
    ready: bool
    shape: tuple[int, int]

    def merge(self, shards: Shards) -> None: ...
    def empty_choice(self, like: Tensor) -> Tensor: ...
    def fallback(self, generator: torch.Generator) -> Tensor: ...
    def energy(self, gradient: Tensor, choice: Tensor) -> float: ...
    def install(self, choice: Tensor, shards: Shards, carry: bool) -> None: ...


# (layer, its gradient (m, n) or None where none is asked for, the layer's own generator) → its new subspace.
# May raise LinAlgError.
Choose = Callable[[Any, Tensor | None, torch.Generator], Tensor]


@dataclass(frozen=True)
class SwitchReport:
    """`fallbacks`: matrices for which the usual way failed: they kept their subspace, or took a damped step."""

    seconds: float
    energy_kept: float | None
    fallbacks: int


def generator_for(seed: int, step: int, index: int) -> torch.Generator:
    """Random numbers that depend on the run's seed, the step and the layer alone: equal on all ranks and devices."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 10_007 + index) % 2**63)


def initial_generator(seed: int, index: int) -> torch.Generator:
    """For what a layer starts with; apart from those of every step."""
    return generator_for(seed, -1, index)


def switch(
    layers: Sequence[Switching],
    gradients: dict[str, Tensor] | None,
    choose: Choose,
    shards: Shards,
    seed: int,
    step: int,
    carry: bool = False,
) -> SwitchReport:
    """Merge every layer and give it a new subspace, chosen from the mean over ranks of `gradients`. Collective.

    Each layer's subspace is chosen by one rank, in turn, and sent to the others: the work is shared out, and all ranks
    have the same bits. A layer whose gradient is not finite, or whose decomposition fails, keeps its subspace and is
    counted; where it has none yet, it gets a random one. `gradients` is emptied on the way; None where the choice does
    not depend on them. `carry`: the first moment is moved along.
    """
    began = time.perf_counter()
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = _share_out(layers, gradients, shards) if gradients is not None else {}

    chosen: dict[int, Tensor | None] = {}
    energy, failed = 0.0, torch.zeros(len(layers))
    for index in range(rank, len(layers), world):
        layer = layers[index]
        gradient = mine.pop(layer.name, None)
        choice = _choose_or_none(choose, layer, gradient, generator_for(seed, step, index))
        if choice is not None and gradient is not None:
            energy += layer.energy(gradient, choice)
        if choice is None:
            failed[index] = 1
            choice = None if layer.ready else layer.fallback(generator_for(seed, step, index))
        chosen[index] = choice

    device = shards.device
    counted = torch.cat([failed, torch.tensor([energy])]).double().to(device)
    dist.all_reduce(counted)
    counted = counted.cpu()
    for index, layer in enumerate(layers):
        layer.merge(shards)
        if bool(counted[index]) and layer.ready:
            continue
        own = chosen.pop(index, None)
        buffer = layer.empty_choice(shards.example)
        if own is not None:
            buffer.copy_(own)
        dist.broadcast(buffer, src=index % world)
        layer.install(buffer, shards, carry)

    fallbacks = int(counted[:-1].sum())
    renewed = len(layers) - fallbacks
    kept = float(counted[-1]) / renewed if gradients is not None and renewed else None
    return SwitchReport(time.perf_counter() - began, kept, fallbacks)


def _share_out(layers: Sequence[Switching], gradients: dict[str, Tensor], shards: Shards) -> dict[str, Tensor]:
    """The mean over ranks of each layer's gradient, on the rank that is to use it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        # An expert that none of this rank's tokens reached has left no gradient.
        gradient = gradients.pop(layer.name) if layer.name in gradients else shards.example.new_zeros(layer.shape)
        dist.reduce(gradient, dst=index % world)
        if index % world == rank:
            mine[layer.name] = gradient.div_(world)
    return mine


def _choose_or_none(
    choose: Choose, layer: Switching, gradient: Tensor | None, generator: torch.Generator
) -> Tensor | None:
    if gradient is not None and not bool(torch.isfinite(gradient).all()):
        return None
    try:
        choice = choose(layer, gradient, generator)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, not declared
        return None
    return choice if bool(torch.isfinite(choice).all()) else None


class Renewing(Protocol):
    """What a layer offers whose next subspace follows from its number alone."""

    def merge(self, shards: Shards) -> None: ...
    def renew(self, shards: Shards, carry: bool) -> None: ...


def renew_seeded(layers: Sequence[Renewing], shards: Shards, carry: bool) -> SwitchReport:
    """Merge every layer and go on to its next subspace; nothing is chosen and nothing sent. Collective."""
    began = time.perf_counter()
    for layer in layers:
        layer.merge(shards)
        layer.renew(shards, carry)
    return SwitchReport(time.perf_counter() - began, None, 0)
