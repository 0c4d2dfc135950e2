"""GaLore+'s layer for q and k: a basis on the right, and a sparse residual of what it leaves out.

    W_eff = s·W + B Qᵀ + scatter(L, e)

L is a fixed set of places, e what the residual's steps have added up to since the last merge. Its optimizer is not
elementwise in e (the denominator takes the core's second moment), so e is no trained parameter: `collector` is. It
receives, as its gradient, what the method needs of the full gradient at L, and DeepSpeed reduces and clips it with all
the others.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.lowrank.adapted import Read
from trainer.lowrank.entries import new_positions, with_entries
from trainer.lowrank.linalg import wide
from trainer.lowrank.projected import ProjectedLinear
from trainer.methodconfig import entry_count
from trainer.zero import Shards

# A power of two, so nothing is rounded: in the norm that clips, Ĝ[L] shall not count. The core's gradient stands there.
QUIET = 2.0**-20


class _Product(torch.autograd.Function):
    """x (s·W + scatter(L, e))ᵀ. The collector (2, k) gets [(G − Ĝ)[L], QUIET·Ĝ[L]] with Ĝ = G Q Qᵀ."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, collector: Tensor, basis: Tensor, layer: "ResidualLinear"
    ) -> Tensor:
        ctx.save_for_backward(x, weight, basis)
        ctx.layer, ctx.scale = layer, layer.scale
        return x @ with_entries(weight, layer.scale, layer.residual, layer.positions, layer.shape).T

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outputs
        x, weight, basis = ctx.saved_tensors
        layer: ResidualLinear = ctx.layer
        to_x = g @ with_entries(weight, ctx.scale, layer.residual, layer.positions, layer.shape)
        collected, _ = layer.collected(wide(g.flatten(0, -2)).T @ wide(x.flatten(0, -2)), basis)
        return to_x, None, collected, None, None


class ResidualLinear(ProjectedLinear):
    """`active` says whether the places have been chosen. `updates` counts the residual's steps."""

    residual: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, linear: nn.Linear, name: str, rank: int, density: float) -> None:
        super().__init__(linear, name, rank, "right")
        self.count = count = entry_count(density, self.rows, self.columns)
        values = wide(linear.weight.new_zeros(3, count))
        self.collector = nn.Parameter(linear.weight.new_zeros(2, count))
        self.positions = new_positions(count, linear, name)
        self.register_buffer("residual", values[0].clone())
        self.register_buffer("first", values[1].clone())  # ΔM
        self.register_buffer("second", values[2].clone())  # ΔV
        self.active, self.updates = False, 0

    def apart_product(self, x: Tensor) -> Tensor:
        if not self.active:
            # The collector takes part all the same, with a gradient of 0: every engine expects one of every parameter.
            return super().apart_product(x) + 0.0 * self.collector.sum()
        core = functional.linear(functional.linear(x, self.A), self.B)
        y: Tensor = _Product.apply(x, self.weight, self.collector, self.A, self)  # type: ignore[no-untyped-call]
        return self.with_bias(y + core)

    def collected(self, gradient: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """(the collector's gradient (2, k), G Q (m, r)). G (m, n) is wide: ΔG is a small difference of large ones."""
        q = wide(basis)
        places, projected = self.positions.long(), gradient @ q.T
        seen = (projected @ q).flatten()[places]
        collected = torch.stack([gradient.flatten()[places] - seen, QUIET * seen])
        return collected.to(self.collector.dtype), projected

    def from_gradient(self, gradient: Tensor) -> tuple[Tensor, ...]:
        if not self.active:
            return *super().from_gradient(gradient), torch.zeros_like(self.collector)
        collected, projected = self.collected(gradient, self.A)
        return projected.to(self.B), collected

    def core_gradients(self, g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        if not self.active:
            return *super().core_gradients(g, x), torch.zeros_like(self.collector)
        return self.from_gradient(wide(g).T @ wide(x))

    def add_change(self, shards: Shards, keep: float) -> None:
        super().add_change(shards, keep)
        if self.active:
            shards.add_entries(self.weight, 1.0, self.positions, self.residual)

    def absorb(self, shards: Shards, step: int, keep: float) -> None:
        super().absorb(shards, step, keep)
        self.residual.zero_()

    def change(self, read: Read) -> Tensor:
        change = super().change(read)
        if not self.active:
            return change
        return with_entries(change, 1.0, self.residual, read(self.positions), self.shape)

    def trained(self) -> list[nn.Parameter]:
        return [self.core, self.collector]

    def merge(self, shards: Shards, step: int) -> None:
        super().merge(shards, step)
        self.residual.zero_()

    def state(self) -> dict[str, Any]:
        return super().state() | {"active": self.active, "updates": self.updates}
