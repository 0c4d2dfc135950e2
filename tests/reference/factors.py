"""Trained factors: lowrank, lora, dora, relora, sltrain. The chain rule by hand.

With a product s·B·A (B m×r, A r×n) inside the effective weight and G the gradient of that sum:
dB = s·G·Aᵀ      dA = s·Bᵀ·G      B ← (1−ηλ)B − ηN(dB)      A ← (1−ηλ)A − ηN(dA)
"""

import torch
from torch import Tensor

from tests.reference.adam import Moments
from tests.reference.rule import Draws, Problem, Rule


class Factors:
    """s·B·A with AdamW on both."""

    def __init__(self, B: Tensor, A: Tensor, scale: float, problem: Problem) -> None:
        self.B, self.A, self.scale, self.decay = B, A, scale, problem.decay
        self.moments = {"B": Moments(B, problem), "A": Moments(A, problem)}

    def product(self) -> Tensor:
        return self.scale * self.B @ self.A

    def update(self, G: Tensor, eta: float) -> None:
        dB, dA = self.scale * G @ self.A.T, self.scale * self.B.T @ G
        keep = 1 - eta * self.decay
        self.B = keep * self.B - eta * self.moments["B"].direction(dB)
        self.A = keep * self.A - eta * self.moments["A"].direction(dA)


class LowRank(Rule):
    """W_eff = BA."""

    def __init__(self, weight: Tensor, problem: Problem, draws: Draws) -> None:
        super().__init__(weight, problem, draws)
        self.factors = Factors(draws.initial("B").to(weight), draws.initial("A").to(weight), 1.0, problem)
        self.weight = self.factors.product()

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        self.factors.update(gradient, eta)
        self.weight = self.factors.product()


class Lora(Rule):
    """W_eff = W + (α/r)BA, W frozen, B from 0 (Hu et al. 2022, arXiv:2106.09685)."""

    def __init__(self, weight: Tensor, problem: Problem, draws: Draws) -> None:
        super().__init__(weight, problem, draws)
        settings = problem.settings
        self.base = self.weight
        B = self.weight.new_zeros(weight.shape[0], settings.rank)
        self.factors = Factors(B, draws.initial("A").to(weight), settings.alpha / settings.rank, problem)

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        self.factors.update(gradient, eta)
        self.weight = self.base + self.factors.product()


class Dora(Lora):
    """W_eff = g∘D/‖D‖_row, D = W + (α/r)BA (Liu et al. 2024, arXiv:2402.09353), the norm a constant in the gradient.

    dg_i = ⟨G_i, D_i⟩/‖D_i‖      dD_i = g_i/‖D_i‖·G_i      g begins as the row norms of W and has no decay.
    """

    def __init__(self, weight: Tensor, problem: Problem, draws: Draws) -> None:
        super().__init__(weight, problem, draws)
        self.magnitude = self.base.square().sum(1, keepdim=True).sqrt()  # g, m×1
        self.moments = Moments(self.magnitude, problem)
        self.recompose()

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        D, norm = self.direction()
        d_magnitude = (gradient * D).sum(1, keepdim=True) / norm
        self.factors.update(self.magnitude / norm * gradient, eta)
        self.magnitude = self.magnitude - eta * self.moments.direction(d_magnitude)
        self.recompose()

    def direction(self) -> tuple[Tensor, Tensor]:
        D = self.base + self.factors.product()
        return D, D.square().sum(1, keepdim=True).sqrt()

    def recompose(self) -> None:
        D, norm = self.direction()
        self.weight = self.magnitude / norm * D


class Relora(Lora):
    """Lora that merges and begins again every τ steps (Lialin et al. 2024, arXiv:2307.05695).

    The restart belongs before the gradient of its step, which it does not change: W_eff stays as it is.
    """

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        if step > 0 and step % self.problem.settings.period == 0:
            self.restart(step)
        super().update(gradient, eta, step)

    def restart(self, step: int) -> None:
        self.base = self.weight  # W ← W + sBA
        self.factors.B = torch.zeros_like(self.factors.B)
        self.factors.A = self.draws.restart(step).to(self.weight)
        for name, moments in self.factors.moments.items():
            moments.M = moments.M * self.draws.kept(step, name, "m").to(self.weight)
            moments.V = moments.V * self.draws.kept(step, name, "v").to(self.weight)


class SLTrain(Rule):
    """W_eff = (α/r)BA + S, S the values v on a fixed support (Han et al. 2024, arXiv:2406.02214). dv = G there."""

    def __init__(self, weight: Tensor, problem: Problem, draws: Draws) -> None:
        super().__init__(weight, problem, draws)
        B, A = draws.initial("B").to(weight), draws.initial("A").to(weight)
        self.factors = Factors(B, A, problem.settings.alpha / problem.settings.rank, problem)
        self.positions = draws.initial("positions").to(weight.device).long()
        self.values = draws.initial("values").to(weight)
        self.moments = Moments(self.values, problem)
        self.weight = self.factors.product() + self.scattered()

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        self.factors.update(gradient, eta)
        N = self.moments.direction(gradient.flatten()[self.positions])
        self.values = (1 - eta * self.problem.decay) * self.values - eta * N
        self.weight = self.factors.product() + self.scattered()

    def scattered(self) -> Tensor:
        S = torch.zeros_like(self.weight).flatten()
        S[self.positions] = self.values
        return S.reshape(self.weight.shape)
