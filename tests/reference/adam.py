"""Adam and momentum SGD on one array, and the rule that uses them on a whole matrix (`full`).

M ← β₁M + (1−β₁)R      V ← β₂V + (1−β₂)R∘R
adamw: N = M/(1−β₁ᵗ) / (√(V/(1−β₂ᵗ)) + ε)      msgd: N = M
"""

import torch
from torch import Tensor

from tests.reference.rule import Draws, Problem, Rule


class Moments:
    """M, V and Adam's count t of one array."""

    def __init__(self, like: Tensor, problem: Problem, optimizer: str = "adamw") -> None:
        self.problem = problem
        self.optimizer = optimizer
        self.M = torch.zeros_like(like)
        self.V = torch.zeros_like(like)
        self.count = 0

    def reset(self) -> None:
        self.M = torch.zeros_like(self.M)
        self.V = torch.zeros_like(self.V)
        self.count = 0

    def direction(self, R: Tensor) -> Tensor:
        """N, after the moments have taken in R."""
        beta1, beta2 = self.problem.betas
        self.count += 1
        self.M = beta1 * self.M + (1 - beta1) * R
        if self.optimizer == "msgd":
            return self.M
        self.V = beta2 * self.V + (1 - beta2) * R * R
        return self.M / (1 - beta1**self.count) / (self.corrected_second().sqrt() + self.problem.epsilon)

    def corrected_second(self) -> Tensor:
        """V̂ = V/(1−β₂ᵗ)."""
        return self.V / (1 - self.problem.betas[1] ** self.count)


class Full(Rule):
    """W ← (1−ηλ)W − ηN(G)."""

    def __init__(self, weight: Tensor, problem: Problem, draws: Draws) -> None:
        super().__init__(weight, problem, draws)
        self.moments = Moments(self.weight, problem, problem.settings.optimizer)

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        N = self.moments.direction(gradient)
        self.weight = (1 - eta * self.problem.decay) * self.weight - eta * N
