"""GaLore: gradient low-rank projection (Zhao et al. 2024, arXiv:2403.03507, algorithm 2).

    every τ steps   P = the top-r left singular vectors of G   (m, r)      [m ≤ n; else the right ones, on Gᵀ]
    R = PᵀG         M ← β₁M + (1−β₁)R     V ← β₂V + (1−β₂)R²     W ← (1 − ηλ)W − ηα·P·M̂/(√V̂ + ε)

Moments and Adam's count stay as they are at a switch. Where we differ: signs of singular vectors are made canonical;
the decomposition runs in float64 (or is a randomised one); clipping sees ‖PᵀG‖, not ‖G‖; a gradient that is not finite
keeps the old basis.
"""

import torch
from torch import Tensor

from trainer.lowrank.linalg import exact_basis, randomized_basis
from trainer.methods.projected import Projected


class GaLore(Projected):
    def choose(self, gradient: Tensor, generator: torch.Generator) -> Tensor:
        config = self.config
        if config.svd == "exact":
            return exact_basis(gradient, config.rank)
        return randomized_basis(gradient, config.rank, config.oversampling, config.power_iterations, generator)
