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

from trainer.lowrank.linalg import is_finite
from trainer.zero import Shards


class Switching(Protocol):
    """What a layer offers whose subspace is chosen: a basis, or a set of entries."""

    name: str
    ready: bool
    shape: tuple[int, int]

    def merge(self, shards: Shards, step: int) -> None: ...
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


# Calls what it is given once for every layer, with this rank's mean gradient; see `trainer.lowrank.probe`.
Gradients = Callable[[Callable[[Any, Tensor | None], None]], None]


def switch(
    layers: Sequence[Switching],
    gradients: Gradients | None,
    choose: Choose,
    shards: Shards,
    seed: int,
    step: int,
    carry: bool = False,
) -> SwitchReport:
    """Merge every layer and give it a new subspace, chosen from the mean over ranks of its gradient. Collective.

    Each layer's subspace is chosen by one rank, in turn, and sent to the others: the work is shared out, and all ranks
    have the same bits. A layer whose gradient is not finite, or whose decomposition fails, keeps its subspace and is
    counted; where it has none yet, it gets a random one. `gradients` is None where the choice does not depend on them.
    `carry`: the first moment is moved along.
    """
    began = time.perf_counter()
    choosing = _Choosing(layers, choose, shards, seed, step)
    if gradients is None:
        choosing.without_gradients()
    else:
        gradients(choosing.take)
        choosing.choose_mine()

    device = shards.device
    counted = torch.cat([choosing.failed, torch.tensor([choosing.energy])]).double().to(device)
    dist.all_reduce(counted)
    counted = counted.cpu()
    for index, layer in enumerate(layers):
        layer.merge(shards, step)
        if bool(counted[index]) and layer.ready:
            continue
        own = choosing.chosen.pop(index, None)
        buffer = layer.empty_choice(shards.example)
        if own is not None:
            buffer.copy_(own)
        dist.broadcast(buffer, src=choosing.owner[index])
        layer.install(buffer, shards, carry)

    fallbacks = int(counted[:-1].sum())
    renewed = len(layers) - fallbacks
    kept = float(counted[-1]) / renewed if gradients is not None and renewed else None
    return SwitchReport(time.perf_counter() - began, kept, fallbacks)


class _Choosing:
    """Which rank chooses for which layer, and what this one has chosen.

    A rank holds one gradient at most that waits for its turn: as soon as every rank has one, all decompose theirs.
    """

    def __init__(self, layers: Sequence[Switching], choose: Choose, shards: Shards, seed: int, step: int) -> None:
        self._layers, self._choose, self._shards = layers, choose, shards
        self._index = {layer.name: index for index, layer in enumerate(layers)}
        self._seed, self._step = seed, step
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._waiting: tuple[int, Tensor] | None = None
        self.owner: dict[int, int] = {}
        self.chosen: dict[int, Tensor | None] = {}
        self.energy, self.failed = 0.0, torch.zeros(len(layers))

    def take(self, layer: Switching, gradient: Tensor | None) -> None:
        """The next layer's gradient on this rank, which is used up. Collective."""
        index, turn = self._index[layer.name], len(self.owner) % self._world
        self.owner[index] = turn
        if gradient is None:
            gradient = self._shards.example.new_zeros(layer.shape)
        dist.reduce(gradient, dst=turn)
        if turn == self._rank:
            self._waiting = (index, gradient.div_(self._world))
        if turn == self._world - 1:
            self.choose_mine()

    def choose_mine(self) -> None:
        if self._waiting is not None:
            self._decide(*self._waiting)
            self._waiting = None

    def without_gradients(self) -> None:
        for index in range(len(self._layers)):
            self.owner[index] = index % self._world
            if self.owner[index] == self._rank:
                self._decide(index, None)

    def _decide(self, index: int, gradient: Tensor | None) -> None:
        layer = self._layers[index]
        found = decided(self._choose, layer, gradient, self._seed, self._step, index)
        self.chosen[index] = found.subspace
        self.failed[index] = float(found.failed)
        if gradient is not None and found.subspace is not None and not found.failed:
            self.energy += layer.energy(gradient, found.subspace)


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer's subspace. None: it stays. `failed`: it stays, or is a random one, because none could
    be chosen."""

    subspace: Tensor | None
    failed: bool = False


def decided(choose: Choose, layer: Any, gradient: Tensor | None, seed: int, step: int, index: int) -> Decision:
    """For the `index`-th layer, before the 0-based `step`."""
    choice = choose_or_none(choose, layer, gradient, generator_for(seed, step, index))
    if choice is None:
        return Decision(None if layer.ready else layer.fallback(generator_for(seed, step, index)), failed=True)
    return Decision(choice)


def choose_or_none(
    choose: Choose, layer: Switching, gradient: Tensor | None, generator: torch.Generator
) -> Tensor | None:
    """The layer's new subspace, or None where the gradient is not finite or the decomposition fails."""
    if gradient is not None and not is_finite(gradient):
        return None
    try:
        choice = choose(layer, gradient, generator)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, not declared
        return None
    return choice if bool(torch.isfinite(choice).all()) else None


class Renewing(Protocol):
    """What a layer offers whose next subspace follows from its number alone."""

    def merge(self, shards: Shards, step: int) -> None: ...
    def renew(self, shards: Shards, carry: bool) -> None: ...


def renew_seeded(layers: Sequence[Renewing], shards: Shards, step: int, carry: bool) -> SwitchReport:
    """Merge every layer and go on to its next subspace; nothing is chosen and nothing sent. Collective."""
    began = time.perf_counter()
    for layer in layers:
        layer.merge(shards, step)
        layer.renew(shards, carry)
    return SwitchReport(time.perf_counter() - began, None, 0)
