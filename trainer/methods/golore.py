"""GoLore: random low-rank projection (He et al. 2024, arXiv:2410.11289, algorithm 1).

GaLore for the first steps, and for the last `random_fraction` of them, from the next switch on, a basis that is uniform
on the Stiefel manifold: P = qr(Z), Z Gaussian, the signs of R's diagonal moved into Q, so that E[PPᵀ] = (r/m)·I. No
gradient is asked for then, and no factor √(m/r) is applied. GoLore@x% of the paper is random_fraction = x/100.

Momentum projection (`carried`) is the paper's M ← P_newᵀ(P_old M); V stays.
"""

import torch
from torch import Tensor

from trainer.lowrank.projected import ProjectedLinear
from trainer.methodconfig import GoLoreConfig
from trainer.methods.galore import GaLore


class GoLore(GaLore):
    def needs_gradient(self, step: int) -> bool:
        steps = self.spec.optimisation.steps
        assert steps is not None and isinstance(self.config, GoLoreConfig)
        return step < self.config.first_random_step(steps)

    def choose(self, layer: ProjectedLinear, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        if gradient is not None:
            return super().choose(layer, gradient, generator)
        return layer.fallback(generator)
