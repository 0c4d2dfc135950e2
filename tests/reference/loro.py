"""LORO (Mo, Huang and Pan, ICLR 2025): Riemannian steps on the manifold of rank-r matrices, here on full matrices.

W_eff = λBA, or W₀ − λB₀A₀ + λBA over a frozen W₀. dB = λGAᵀ, dA = λBᵀG; N_B and N_A are their Adam directions.
Exact, every K steps: BA ← SVD_r(BA − ηT), balanced, with the tangent vector of N_B and N_A at BA:

    T = B(BᵀB)⁻¹·N_A + (I − B(BᵀB)⁻¹Bᵀ)·N_B·(AAᵀ)⁻¹A

For N_B = GAᵀ, N_A = BᵀG this is 𝒫_T(G) = P_B·G + G·P_A − P_B·G·P_A. Adam directions come from no common G, and the
part that both project could be had from either: proposition 4 takes it from N_A, proposition 3 from N_B. Here, as
in the algorithm, from N_A.
"""

import torch
from torch import Tensor

from tests.reference.adam import Moments
from tests.reference.basis import column_signs
from tests.reference.rule import Draws, Problem, Rule


def tangent(B: Tensor, A: Tensor, N_B: Tensor, N_A: Tensor) -> Tensor:
    """T (m×n). The pseudo-inverses are B⁺ = (BᵀB)⁻¹Bᵀ and A⁺ = Aᵀ(AAᵀ)⁻¹."""
    B_plus, A_plus = torch.linalg.pinv(B), torch.linalg.pinv(A)
    Z = N_B @ A_plus.T
    return B_plus.T @ N_A + Z - B @ (B_plus @ Z)


def balanced(X: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """UΣ^½ and Σ^½Vᵀ of SVD_r(X); each column of U has its entry of largest magnitude positive."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    U, root, Vh = U[:, :rank], S[:rank].sqrt(), Vh[:rank]
    signs = column_signs(U)
    return (U * signs * root).to(X), (root[:, None] * signs.T * Vh).to(X)


class Loro(Rule):
    def __init__(self, weight: Tensor, problem: Problem, draws: Draws) -> None:
        super().__init__(weight, problem, draws)
        self.B, self.A = draws.initial("B").to(weight), draws.initial("A").to(weight)
        self.moments_B, self.moments_A = Moments(self.B, problem), Moments(self.A, problem)
        product = problem.settings.scale * self.B @ self.A
        self.base = self.weight - product if problem.frozen else torch.zeros_like(self.weight)
        self.weight = self.base + product

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        settings = self.problem.settings
        N_B = self.moments_B.direction(settings.scale * gradient @ self.A.T)
        N_A = self.moments_A.direction(settings.scale * self.B.T @ gradient)
        keep = 1 - eta * self.problem.decay
        self.B, self.A = keep * self.B, keep * self.A
        exact = (step + 1) % settings.period == 0
        if exact and settings.exact_step == "riemannian":
            moved = self.B @ self.A - eta * tangent(self.B, self.A, N_B, N_A)
            self.B, self.A = balanced(moved, settings.rank)
        else:
            self.between(N_B, N_A, eta)
            if exact and settings.exact_step == "svd":
                self.B, self.A = balanced(self.B @ self.A, settings.rank)
        if exact and settings.refresh:
            self.moments_B.reset()
            self.moments_A.reset()
        self.weight = self.base + settings.scale * self.B @ self.A

    def between(self, N_B: Tensor, N_A: Tensor, eta: float) -> None:
        settings = self.problem.settings
        if settings.between == "preconditioned":  # N_B(AAᵀ)⁻¹ and (BᵀB)⁻¹N_A
            N_B, N_A = (
                N_B @ torch.linalg.inv(self.A @ self.A.T),
                torch.linalg.inv(self.B.T @ self.B) @ N_A,
            )
        elif settings.between == "scaled":
            eta = eta * settings.rank / self.problem.hidden
        self.B, self.A = self.B - eta * N_B, self.A - eta * N_A
