"""The layer of GaLore's family: a fixed basis and a trained core.

    y = s·x Wᵀ + (x Aᵀ) Bᵀ        so that        W_eff = s·W + B A

With the basis left, B = P (m, r) is fixed and A (r, n) trained from 0: ∂L/∂A = PᵀG, which is what GaLore feeds to
Adam. With it right, A = Qᵀ (r, n) is fixed and B (m, r) trained: ∂L/∂B = G Q. See docs/decisions/0001.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.lowrank.adapted import FrozenLinear, Read
from trainer.lowrank.linalg import energy_kept, random_basis, wide
from trainer.zero import Shards

Side = Literal["left", "right"]


def side_of(rows: int, columns: int) -> Side:
    """The papers' rule: left when m ≤ n. Asked once, when a layer is made; the layer stores the answer."""
    return "left" if rows <= columns else "right"


class ProjectedLinear(FrozenLinear):
    def __init__(self, linear: nn.Linear, name: str, rank: int, side: Side) -> None:
        super().__init__(linear, name)
        self.side, self.rank = side, rank
        self.B = nn.Parameter(linear.weight.new_zeros(self.rows, rank), requires_grad=side == "right")
        self.A = nn.Parameter(linear.weight.new_zeros(rank, self.columns), requires_grad=side == "left")

    @property
    def core(self) -> nn.Parameter:
        return self.A if self.side == "left" else self.B

    @property
    def basis(self) -> nn.Parameter:
        """The fixed factor: B = P (m, r) when left, A = Qᵀ (r, n) when right."""
        return self.B if self.side == "left" else self.A

    def apart_product(self, x: Tensor) -> Tensor:
        return self.frozen_product(x) + functional.linear(functional.linear(x, self.A), self.B)

    def from_gradient(self, gradient: Tensor) -> tuple[Tensor, ...]:
        left, right = self.B.to(gradient), self.A.to(gradient)
        return ((left.T @ gradient if self.side == "left" else gradient @ right.T).to(self.core),)

    def core_gradients(self, g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return ((g @ self.B).T @ x if self.side == "left" else g.T @ functional.linear(x, self.A),)

    def add_change(self, shards: Shards, keep: float) -> None:
        shards.add_product(self.weight, keep, self.B, self.A)

    def change(self, read: Read) -> Tensor:
        return wide(read(self.B)) @ wide(read(self.A))

    # ------------------------------------------------------------------------------------------------- at a switch

    def toward(self, gradient: Tensor) -> Tensor:
        """The gradient with the projected side first: its left space is what a basis is chosen from."""
        return gradient if self.side == "left" else gradient.T

    def empty_choice(self, like: Tensor) -> Tensor:
        """Where a choice made on another rank is received: P or Q, tall."""
        return like.new_empty(self.rows if self.side == "left" else self.columns, self.rank)

    def fallback(self, generator: torch.Generator) -> Tensor:
        """A random basis, where none can be had from the gradient, or none is to be."""
        return random_basis(self.rows if self.side == "left" else self.columns, self.rank, generator)

    def energy(self, gradient: Tensor, choice: Tensor) -> float:
        return energy_kept(self.toward(gradient), choice)

    def install(self, choice: Tensor, shards: Shards, carry: bool) -> None:
        """Give the merged layer its new basis. Collective.

        With `carry`: M ← P_newᵀ(P_old M), or (M Q_oldᵀ)Q_new.
        """
        if carry and self.ready:
            old, first = wide(shards.read(self.basis)), shards.read_moment(self.core, "exp_avg")
            moved = choice.T @ (old @ first) if self.side == "left" else (first @ old) @ choice
            shards.write_moment(self.core, "exp_avg", moved)
        shards.write(self.basis, choice if self.side == "left" else choice.T.contiguous())
        self.ready = True
