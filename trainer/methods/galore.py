"""GaLore: gradient low-rank projection (Zhao et al. 2024, arXiv:2403.03507, algorithm 2).

    every τ steps   P = the top-r left singular vectors of G   (m, r)      [m ≤ n; else the right ones, on Gᵀ]
    R = PᵀG         M ← β₁M + (1−β₁)R     V ← β₂V + (1−β₂)R²     W ← (1 − ηλ)W − ηα·P·M̂/(√V̂ + ε)

At a switch the moments stay as they are (`kept`), or the first one is moved through both bases, M ← P_newᵀ(P_old M)
(`carried`: GoLore's momentum projection), or both and Adam's count start again (`reset`). With `msgd` the step is
W ← (1 − ηλ)W − ηα·P·M. With `switch_batches` ℬ the switch's step averages ℬ global batches: its gradient feeds basis
and moments alike (GoLore's large-batch GaLore).

Where we differ: signs of singular vectors are made canonical; the decomposition runs in float64 (or is a randomised
one); clipping sees ‖PᵀG‖, not ‖G‖; a gradient that is not finite keeps the old basis.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.lowrank.linalg import exact_basis, randomized_basis
from trainer.lowrank.projected import ProjectedLinear, side_of
from trainer.methods.subspace import ChosenSubspace


class GaLore(ChosenSubspace):
    # Not typed as GaLoreConfig: its relatives have the same fields and more.
    config: Any

    def make(self, linear: nn.Linear, name: str, index: int) -> ProjectedLinear:
        return ProjectedLinear(linear, name, self.config.rank, side_of(*linear.weight.shape))

    def choose(self, layer: ProjectedLinear, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        assert gradient is not None
        return self.decompose(layer.toward(gradient), generator)

    def decompose(self, matrix: Tensor, generator: torch.Generator) -> Tensor:
        """(m, n) → (m, r): the top left singular vectors, as the settings want them computed."""
        config = self.config
        if config.svd == "exact":
            return exact_basis(matrix, config.rank)
        return randomized_basis(matrix, config.rank, config.oversampling, config.power_iterations, generator)
