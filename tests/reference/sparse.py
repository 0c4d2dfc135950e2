"""Frozen weights, an optimizer on k entries: gasare, gosare (He et al. 2024, arXiv:2410.11289, algorithm 5).

M ← β₁·S∘M + (1−β₁)·S∘G      V likewise      W ← (1−ηλ)W − ηα·S∘N
with dense masks, so that an entry that leaves S loses its moments and one that enters begins at 0.
"""

import torch
from torch import Tensor

from tests.reference.adam import Moments
from tests.reference.rule import Draws, Problem, Rule


def mask_of(positions: Tensor, like: Tensor) -> Tensor:
    """1 at the flat row-major positions, else 0."""
    mask = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
    mask[positions.to(like.device).long()] = 1
    return mask.reshape(like.shape)


def largest(values: Tensor, count: int) -> Tensor:
    """The flat positions of the `count` largest magnitudes; of equal ones the lowest positions."""
    return values.abs().flatten().sort(descending=True, stable=True).indices[:count]


def count_of(density: float, like: Tensor) -> int:
    return max(1, int(density * like.numel()))


class Sparse(Rule):
    """All but the choice of the entries."""

    def __init__(self, weight: Tensor, problem: Problem, draws: Draws) -> None:
        super().__init__(weight, problem, draws)
        self.mask = torch.zeros_like(self.weight)
        self.moments = Moments(self.weight, problem, problem.settings.optimizer)

    def choose(self, gradient: Tensor, step: int) -> Tensor:
        raise NotImplementedError

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        settings = self.problem.settings
        if step % settings.period == 0:
            self.mask = mask_of(self.choose(gradient, step), self.weight)
            self.moments.M = self.mask * self.moments.M
            self.moments.V = self.mask * self.moments.V
        N = self.moments.direction(self.mask * gradient)
        self.weight = (1 - eta * self.problem.decay) * self.weight - eta * settings.alpha * self.mask * N


class GaSare(Sparse):
    """The k entries with the largest abs(G)."""

    def choose(self, gradient: Tensor, step: int) -> Tensor:
        return largest(gradient, count_of(self.problem.settings.density, gradient))


class GoSare(Sparse):
    """k entries, uniformly at random."""

    def choose(self, gradient: Tensor, step: int) -> Tensor:
        return self.draws.subset(step)
