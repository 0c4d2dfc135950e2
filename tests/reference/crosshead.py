"""GaLore+ (Liao et al. 2024, arXiv:2412.19820): one basis for all heads, and a sparsely coded residual.

On matrices with heads the basis stands right whatever the shape: Q = the first r right singular vectors of the rows
of ⌈r/d_k⌉ heads of G. All others are as in galore. The residual there, from update k+1 on, on the entries L:
Ĝ = GQQᵀ      ΔG = (G − Ĝ)∘L      ΔM ← β₁ΔM + (1−β₁)ΔG      ΔV ← β₂ΔV + 2(1−β₂)Ĝ∘ΔG
δ = ΔM̂ / (√max(U + ΔV̂, ρU) + ε), U = V̂'(Q∘Q)ᵀ, |δ| ≤ 1      W ← W − ηδ
The paper has √(V'Qᵀ + ΔV̂), whose argument may be negative; ρ and Q∘Q repair that.
"""

import math

import torch
from torch import Tensor

from tests.reference.projected import GaLore
from tests.reference.rule import Draws, Problem
from tests.reference.sparse import count_of, largest, mask_of


class GaLorePlus(GaLore):
    def __init__(self, weight: Tensor, problem: Problem, draws: Draws) -> None:
        super().__init__(weight, problem, draws)
        settings = problem.settings
        # δ has a second moment in its denominator, which momentum SGD does not have.
        self.has_residual = problem.heads > 0 and settings.residual_density > 0 and settings.optimizer == "adamw"
        self.mask = torch.zeros_like(self.weight)  # L
        self.dM = torch.zeros_like(self.weight)
        self.dV = torch.zeros_like(self.weight)

    def stands_left(self, m: int, n: int) -> bool:
        return self.problem.heads == 0 and m <= n

    def choose(self, gradient: Tensor, step: int) -> Tensor:
        heads = self.problem.heads
        if heads == 0:
            return super().choose(gradient, step)
        height = gradient.shape[0] // heads  # d_k
        count = min(heads, math.ceil(self.problem.settings.rank / height))
        rows = [gradient[i * height : (i + 1) * height] for i in self.draws.heads(step, count)]
        return self.decompose(torch.cat(rows).T, step)

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        super().update(gradient, eta, step)
        if not self.has_residual:
            return
        settings = self.problem.settings
        since = step + 1 - settings.residual_warmup  # updates of the residual, this one included
        if since == 0:
            positions = largest(self.up(self.moments.M), count_of(settings.residual_density, self.weight))
            self.mask = mask_of(positions, self.weight)
        elif since > 0:
            self.weight = self.weight - eta * self.residual(gradient, since)

    def residual(self, G: Tensor, since: int) -> Tensor:
        """δ, with the core's moments as they are after the same update."""
        (beta1, beta2), floor = self.problem.betas, self.problem.settings.residual_floor
        seen = self.up(self.down(G))  # Ĝ
        dG = (G - seen) * self.mask
        self.dM = beta1 * self.dM + (1 - beta1) * dG
        self.dV = beta2 * self.dV + 2 * (1 - beta2) * seen * dG
        M, V = self.dM / (1 - beta1**since), self.dV / (1 - beta2**since)
        U = self.moments.corrected_second() @ (self.basis * self.basis).T
        delta = M / (torch.maximum(U + V, floor * U).sqrt() + self.problem.epsilon)
        return delta.clamp(-1, 1) * self.mask
