"""A core beside a Gaussian basis that is never stored: made from its seed in the forward pass and in the backward.

    left:   W_eff = s·W + U A,   A (r, n) trained,   ∂L/∂A := PᵀG        P (m, r) Gaussian
    right:  W_eff = s·W + B Uᵀ,  B (m, r) trained,   ∂L/∂B := G Q        Q (n, r) Gaussian

U = P (`transpose`), which makes ∂L/∂A the true gradient of the core, or U = P(PᵀP)⁻¹ (`pinv`), for which the core is
given PᵀG all the same, as the papers' form has it: down with Pᵀ, up with U.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.lowrank.adapted import FrozenLinear, Read
from trainer.lowrank.linalg import wide
from trainer.lowrank.philox import gaussian
from trainer.lowrank.projected import Side
from trainer.zero import Shards


@dataclass(frozen=True)
class Seeded:
    """Names a basis (rows, rank) whose entries have the standard deviation `deviation`."""

    rows: int
    rank: int
    deviation: float
    pinv: bool
    seed: int
    stream: int
    epoch: int

    def down(self, like: Tensor) -> Tensor:
        """P (rows, rank): drawn in float32, then cast to the type of `like`."""
        return (gaussian(self.rows, self.rank, self.seed, self.stream, self.epoch, like.device) * self.deviation).to(
            like
        )

    def up(self, down: Tensor) -> Tensor:
        """U, from P: the same, or P(PᵀP)⁻¹ by Cholesky in float32 or wider, unchecked: a check waits for the device."""
        if not self.pinv:
            return down
        p = wide(down)
        return torch.cholesky_solve(p.T, torch.linalg.cholesky_ex(p.T @ p).L).T.to(down)


class _Product(torch.autograd.Function):
    """The core's part of the layer's output; saves x and the core, and draws the basis anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Tensor, basis: Seeded, side: Side) -> Tensor:
        ctx.save_for_backward(x, core)
        ctx.basis, ctx.side = basis, side
        up = basis.up(basis.down(x))
        return (x @ core.T) @ up.T if side == "left" else (x @ up) @ core.T

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outputs
        x, core = ctx.saved_tensors
        down = ctx.basis.down(g)
        up = ctx.basis.up(down)
        flat_g, flat_x = g.flatten(0, -2), x.flatten(0, -2)
        if ctx.side == "left":
            return (g @ up) @ core, (flat_g @ down).T @ flat_x, None, None
        return (g @ core) @ up.T, flat_g.T @ (flat_x @ down), None, None


class SeededLinear(FrozenLinear):
    """`epoch` counts the switches: it is all that is stored of the basis."""

    def __init__(
        self, linear: nn.Linear, name: str, side: Side, rank: int, deviation: float, pinv: bool, seed: int, stream: int
    ) -> None:
        super().__init__(linear, name)
        self.side, self.rank, self.deviation, self.pinv = side, rank, deviation, pinv
        self.seed, self.stream, self.epoch = seed, stream, 0
        size = (rank, self.columns) if side == "left" else (self.rows, rank)
        self.small = nn.Parameter(linear.weight.new_zeros(size))

    @property
    def core(self) -> nn.Parameter:
        return self.small

    def basis(self) -> Seeded:
        rows = self.rows if self.side == "left" else self.columns
        return Seeded(rows, self.rank, self.deviation, self.pinv, self.seed, self.stream, self.epoch)

    def apart_product(self, x: Tensor) -> Tensor:
        part: Tensor = _Product.apply(x, self.small, self.basis(), self.side)  # type: ignore[no-untyped-call]
        return self.frozen_product(x) + part

    def from_gradient(self, gradient: Tensor) -> tuple[Tensor, ...]:
        down = self.basis().down(gradient)
        return ((down.T @ gradient if self.side == "left" else gradient @ down).to(self.small),)

    def core_gradients(self, g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        down = self.basis().down(g)
        return ((g @ down).T @ x if self.side == "left" else g.T @ (x @ down),)

    def add_change(self, shards: Shards, keep: float) -> None:
        basis, core = self.basis(), shards.current(self.small)
        up = basis.up(basis.down(core))
        if self.side == "left":
            shards.add_product(self.weight, keep, up, core)
        else:
            shards.add_product(self.weight, keep, core, up.T)

    def change(self, read: Read) -> Tensor:
        core, basis = wide(read(self.small)), self.basis()
        up = basis.up(basis.down(core))
        return up @ core if self.side == "left" else core @ up.T

    def renew(self, shards: Shards, carry: bool) -> None:
        """Go on to the next basis of the merged layer. Collective.

        With `carry`: M ← P_newᵀ(U_old M), or (M U_oldᵀ)Q_new: up as an update would go, and down as a gradient.
        """
        old = self.basis()
        self.epoch += 1
        if carry and self.ready:
            first = shards.read_moment(self.small, "exp_avg")
            up, down = old.up(old.down(first)), self.basis().down(first)
            moved = down.T @ (up @ first) if self.side == "left" else (first @ up.T) @ down
            shards.write_moment(self.small, "exp_avg", moved)
        self.ready = True

    def state(self) -> dict[str, Any]:
        return super().state() | {"epoch": self.epoch}
