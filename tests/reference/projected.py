"""Frozen weights, an optimizer inside a subspace: galore, golore, flora, garare.

Left (m ≤ n):  P m×r, R = PᵀG (r×n), W ← (1−ηλ)W − ηα·P·N(R)
Right:         Q n×r, R = GQ  (m×r), W ← (1−ηλ)W − ηα·N(R)·Qᵀ
At steps t ≡ 0 (mod τ), before the update and with that step's own G, the basis is chosen anew.

GaLore: Zhao et al. 2024, arXiv:2403.03507. GoLore: He et al. 2024, arXiv:2410.11289, algorithm 1.
FLORA: Hao et al. 2024, arXiv:2402.03293. GaRare: Liu et al., ICLR 2025.
"""

import torch
from torch import Tensor

from tests.reference.adam import Moments
from tests.reference.basis import randomized_basis, singular_basis, uniform_basis
from tests.reference.rule import Draws, Problem, Rule


class Projected(Rule):
    """All but the choice of the basis."""

    def __init__(self, weight: Tensor, problem: Problem, draws: Draws) -> None:
        super().__init__(weight, problem, draws)
        (m, n), r = weight.shape, problem.settings.rank
        self.left = self.stands_left(m, n)
        self.basis: Tensor | None = None  # P or Q
        core = self.weight.new_zeros((r, n) if self.left else (m, r))
        self.moments = Moments(core, problem, problem.settings.optimizer)

    def stands_left(self, m: int, n: int) -> bool:
        return m <= n

    def choose(self, gradient: Tensor, step: int) -> Tensor:
        raise NotImplementedError

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        settings = self.problem.settings
        if step % settings.period == 0:
            self.switch(gradient, step)
        N = self.moments.direction(self.down(gradient))
        self.weight = (1 - eta * self.problem.decay) * self.weight - eta * settings.alpha * self.up(N)

    def switch(self, gradient: Tensor, step: int) -> None:
        old, new = self.basis, self.choose(gradient, step).to(self.weight)
        self.basis = new
        if old is None or self.problem.settings.moments == "kept":
            return
        if self.problem.settings.moments == "reset":
            self.moments.reset()
        elif self.left:  # M ← P_newᵀ(P_old·M)
            self.moments.M = new.T @ (old @ self.moments.M)
        else:  # M ← (M·Q_oldᵀ)Q_new
            self.moments.M = (self.moments.M @ old.T) @ new

    def down(self, G: Tensor) -> Tensor:
        return self.basis.T @ G if self.left else G @ self.basis

    def up(self, N: Tensor) -> Tensor:
        return self.basis @ N if self.left else N @ self.basis.T


class GaLore(Projected):
    """P: the first r left singular vectors of G; Q: the right ones."""

    def choose(self, gradient: Tensor, step: int) -> Tensor:
        return self.decompose(gradient if self.left else gradient.T, step)

    def decompose(self, T: Tensor, step: int) -> Tensor:
        settings = self.problem.settings
        if settings.svd == "exact":
            return singular_basis(T, settings.rank)
        width = min(settings.rank + settings.oversampling, *T.shape)
        sketch = self.draws.sketch(step, T.shape[1], width)
        return randomized_basis(T, settings.rank, sketch, settings.power_iterations)


class GoLore(GaLore):
    """As galore, then uniform on the Stiefel manifold at the switches of the last share of the steps."""

    def choose(self, gradient: Tensor, step: int) -> Tensor:
        settings, steps = self.problem.settings, self.problem.steps
        # (1 − fraction)·steps is seldom exact in binary: 0.2 of 10 steps must begin at step 8.
        if step >= steps - settings.random_fraction * steps - 1e-9:
            rows = self.weight.shape[0 if self.left else 1]
            return uniform_basis(self.draws.gaussian(step, rows, settings.rank))
        return super().choose(gradient, step)


class Flora(Projected):
    """A Gaussian basis, P_ij ~ N(0, 1/r), used raw both ways."""

    def choose(self, gradient: Tensor, step: int) -> Tensor:
        rows = self.weight.shape[0 if self.left else 1]
        return self.draws.gaussian(step, rows, self.problem.settings.rank)


class GaRare(Projected):
    """A Gaussian basis of the rows, P_ij ~ N(0, 1/m), on the left whatever the shape."""

    def stands_left(self, m: int, n: int) -> bool:
        return True

    def choose(self, gradient: Tensor, step: int) -> Tensor:
        return self.draws.gaussian(step, self.weight.shape[0], self.problem.settings.rank)

    def up(self, N: Tensor) -> Tensor:
        P = self.basis
        if self.problem.settings.back_projection == "pinv":
            return P @ torch.linalg.solve(P.T @ P, N)  # P(PᵀP)⁻¹N
        return P @ N
