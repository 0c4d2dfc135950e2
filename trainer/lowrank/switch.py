"""The change of subspace: merge, choose, write back.

    W ← s·W + B A,   s ← 1,   core ← 0,   basis ← the new one

W_eff, and so the loss, is the same before and after, to rounding. It happens before the step's forward pass, so that
the step's own gradient is the first one to be projected with the new basis.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.lowrank.linalg import energy_kept, random_basis
from trainer.lowrank.linear import LowRankLinear
from trainer.zero import Shards, shape_of

# (left-oriented gradient (m, n), the layer's own generator) → orthonormal basis (m, r)
ChooseBasis = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class SwitchReport:
    seconds: float
    energy_kept: float | None
    fallbacks: int


def generator_for(seed: int, step: int, index: int) -> torch.Generator:
    """Random numbers that depend on the run's seed, the step and the layer alone: equal on all ranks and devices."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 10_007 + index) % 2**63)


def merge(layer: LowRankLinear, shards: Shards) -> None:
    """W ← s·W + B A in float32, rounded once to W's own type; core ← 0. Collective."""
    # The core's fp32 master, not its low-precision copy: what Adam has learnt is merged whole.
    update = shards.read(layer.B).float() @ shards.read(layer.A).float()
    shards.write(layer.weight, shards.read(layer.weight).float().mul_(layer.scale).add_(update))
    shards.write(layer.core, torch.zeros(shape_of(layer.core), device=update.device))
    layer.scale = 1.0


def switch(
    layers: list[LowRankLinear],
    gradients: dict[str, Tensor],
    choose: ChooseBasis,
    shards: Shards,
    seed: int,
    step: int,
) -> SwitchReport:
    """Merge every layer and give it a new basis, chosen from the mean over ranks of `gradients`. Collective.

    Each layer's basis is chosen by one rank, in turn, and sent to the others: the work is shared out, and all ranks
    have the same bits. A layer whose gradient is not finite, or whose decomposition fails, keeps its basis and is
    counted; where it has none yet, it gets a random one. `gradients` is emptied on the way.
    """
    began = time.perf_counter()
    rank, world = dist.get_rank(), dist.get_world_size()
    device = next(iter(gradients.values())).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # energy kept, fallbacks

    mine: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        gradient = gradients.pop(layer.name)
        dist.reduce(gradient, dst=index % world)
        if index % world == rank:
            mine[layer.name] = gradient.div_(world)
    chosen: dict[str, Tensor | None] = {}
    for index, layer in enumerate(layers):
        if index % world == rank:
            toward = mine[layer.name] if layer.side == "left" else mine[layer.name].T
            basis = _choose_or_none(choose, toward, generator_for(seed, step, index))
            totals += torch.tensor([0.0 if basis is None else energy_kept(toward, basis), basis is None]).to(totals)
            chosen[layer.name] = basis
            del mine[layer.name]

    for index, layer in enumerate(layers):
        new = shards.read(layer.basis).float().contiguous()  # the old one, until a better one is known
        merge(layer, shards)
        if index % world == rank:
            basis = chosen.pop(layer.name)
            if basis is None and not new.any():
                rows = shape_of(layer.weight)[0 if layer.side == "left" else 1]
                basis = random_basis(rows, layer.rank, generator_for(seed, step, index)).to(device)
            if basis is not None:
                new = (basis if layer.side == "left" else basis.T).contiguous()
        dist.broadcast(new, src=index % world)
        shards.write(layer.basis, new)

    dist.all_reduce(totals)
    energy, fallbacks = float(totals[0]), int(totals[1])
    renewed = len(layers) - fallbacks
    return SwitchReport(time.perf_counter() - began, energy / renewed if renewed else None, fallbacks)


def _choose_or_none(choose: ChooseBasis, gradient: Tensor, generator: torch.Generator) -> Tensor | None:
    if not bool(torch.isfinite(gradient).all()):
        return None
    try:
        basis = choose(gradient, generator)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, not declared
        return None
    return basis if bool(torch.isfinite(basis).all()) else None
