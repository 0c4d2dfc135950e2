"""GaLore+: cross-head projection, fast SVD, sparsely coded residual (Liao et al. 2024, arXiv:2412.19820).

On q and k (`head_targets`), with d_k rows a head:

    every τ steps   Q = top-r right singular vectors of ⌈r/d_k⌉ random heads' rows of G, stacked   (n, r)
    R = G Q         M', V' of R as in Adam; the same Q for all heads

On other targets: GaLore. Every basis by randomised subspace iteration (Halko et al. 2011) unless `svd` is exact.

The residual, on q and k. After k = `residual_warmup` updates L = the places of the largest |M' Qᵀ|, fixed from then on;
afterwards, at L (algorithm 2), with Ĝ = G Q Qᵀ and ΔG = G − Ĝ:

    ΔM ← β₁ΔM + (1−β₁)ΔG       ΔV ← β₂ΔV + 2(1−β₂)Ĝ⊙ΔG
    δ = ΔM̂ / (√max(V̂'(Q∘Q)ᵀ + ΔV̂, ρ·V̂'(Q∘Q)ᵀ) + ε),  |δ| ≤ 1        W ← W − η(α·N Qᵀ + δ)

Where we differ: the paper's root takes V'Qᵀ, which has negative entries; we take V'(Q∘Q)ᵀ, which has not, keep a share
ρ of it whatever ΔV is, and clip δ. ΔM̂ and ΔV̂ are corrected by the number of the residual's own updates. The paper
takes one head; its r ≤ d_k.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import TrainingSpec
from trainer.errors import SpecError
from trainer.lowrank.entries import largest_entries
from trainer.lowrank.linalg import wide
from trainer.lowrank.projected import ProjectedLinear
from trainer.lowrank.residual import QUIET, ResidualLinear
from trainer.lowrank.switch import SwitchReport
from trainer.lowrank.targets import target_linears
from trainer.methodconfig import GaLorePlusConfig
from trainer.methods.base import StepContext
from trainer.methods.galore import GaLore
from trainer.presets import ALL_LINEAR, HEAD_TARGETS, head_size_of
from trainer.zero import Shards


class GaLorePlus(GaLore):
    def __init__(self, spec: TrainingSpec) -> None:
        super().__init__(spec)
        self.head_size = 0
        self.head_names: set[str] = set()

    def look_at(self, model: nn.Module) -> None:
        size = head_size_of(getattr(model, "config", None))
        if size is None:
            raise SpecError(
                "method.head_targets: this model's configuration states no num_attention_heads; choose galore"
            )
        self.head_size = size
        self.head_names = self._head_names(model)

    def _head_names(self, model: nn.Module) -> set[str]:
        """Last parts of the names of the linear modules whose rows belong to heads."""
        named = set(self.config.head_targets)
        if self.config.targets != (ALL_LINEAR,):
            return named
        there = {name.rpartition(".")[2] for name, _ in target_linears(model, self.config.targets)}
        # By default those of the model's family.
        default = named == set(GaLorePlusConfig().head_targets)
        wanted = set(HEAD_TARGETS) & there if default else named
        if (default and not wanted) or wanted - there:
            raise SpecError(
                f"method.head_targets: {min(wanted - there or named)!r} is no linear module of this model's blocks, "
                f"which have {sorted(there)}; name those that make queries and keys, or none: []"
            )
        return wanted

    def make(self, linear: nn.Linear, name: str, index: int) -> ProjectedLinear:
        config = self.config
        if not self.has_heads(name):
            return super().make(linear, name, index)
        if linear.weight.shape[0] % self.head_size:
            raise SpecError(
                f"method.head_targets: the {linear.weight.shape[0]} rows of {name} are no multiple of the model's "
                f"{self.head_size} rows a head; leave {name.rpartition('.')[2]!r} out"
            )
        if config.residual_density == 0:
            return ProjectedLinear(linear, name, config.rank, "right")
        return ResidualLinear(linear, name, config.rank, config.residual_density)

    def has_heads(self, name: str) -> bool:
        return name.rpartition(".")[2] in self.head_names

    def parameter_groups(self, model: nn.Module) -> list[dict[str, object]]:
        collectors = [layer.collector for layer in self._residuals()]
        group = {"name": "collectors", "params": collectors, "rule": "gradient", "rate": 0.0, "weight_decay": 0.0}
        return [*super().parameter_groups(model), group]

    def choose(self, layer: ProjectedLinear, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        assert gradient is not None
        if not self.has_heads(layer.name):
            return super().choose(layer, gradient, generator)
        heads = layer.rows // self.head_size
        count = min(heads, math.ceil(layer.rank / self.head_size))
        some = torch.randperm(heads, generator=generator)[:count]
        stacked = gradient.view(heads, self.head_size, layer.columns)[some].flatten(0, 1)
        return self.decompose(stacked.T, generator)

    def after_step(self, context: StepContext) -> SwitchReport | None:
        eta, shards = context.learning_rate, context.shards
        # Once a step: on a GPU, reading it waits for the device.
        correction = 1 - self.spec.optimisation.betas[1] ** shards.count("cores")
        for layer in self._residuals():
            if layer.active:
                step = self._residual_step(layer, shards, correction)
                layer.residual.mul_(1.0 - eta * self.decay).sub_(eta * step)
            elif context.step + 1 >= self.config.residual_warmup:
                _choose_places(layer, shards)
        return super().after_step(context)

    def _residuals(self) -> list[ResidualLinear]:
        return [layer for layer in self.layers if isinstance(layer, ResidualLinear)]

    def _residual_step(self, layer: ResidualLinear, shards: Shards, correction: float) -> Tensor:
        """δ at L, after the core's own update; `correction`: 1 − β₂ᵗ of the cores. Collective; equal on all ranks."""
        b1, b2 = self.spec.optimisation.betas
        delta, seen = wide(shards.read(layer.collector))
        layer.first.mul_(b1).add_((1 - b1) * delta)
        layer.second.mul_(b2).add_(2 * (1 - b2) * (seen / QUIET) * delta)
        layer.updates += 1
        basis = wide(shards.read(layer.A))
        projected = shards.read_moment(layer.B, "exp_avg_sq") @ basis.square()
        floor = projected.flatten()[shards.read(layer.positions).long()] / correction
        square = torch.maximum(floor + layer.second / (1 - b2**layer.updates), self.config.residual_floor * floor)
        step: Tensor = layer.first / (1 - b1**layer.updates) / (square.sqrt() + self.spec.optimisation.epsilon)
        return step.clamp(-1.0, 1.0)


def _choose_places(layer: ResidualLinear, shards: Shards) -> None:
    """L: the places of the largest |M'Qᵀ|. Collective; rank 0's choice for all, so that ties break alike."""
    momentum = shards.read_moment(layer.B, "exp_avg") @ wide(shards.read(layer.A))
    places = largest_entries(momentum, layer.count)
    dist.broadcast(places, src=0)
    shards.write(layer.positions, places)
    layer.active = True
