"""A sparse part of a matrix: k of its entries, by their places in the flattened matrix (row-major).

    W_eff = s·W + scatter(I, v)        ∂L/∂v = G[I]

Kept as sorted indices (int32) and values, never as a dense mask. For the length of one layer's forward, and again of
its backward, W_eff stands there whole: a sparse product would be slower at the densities that the methods use.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import SpecError
from trainer.lowrank.adapted import FrozenLinear, Read
from trainer.lowrank.linalg import share_kept, wide
from trainer.methodconfig import entry_count
from trainer.zero import Shards

Sides = tuple[int, int]


def largest_entries(matrix: Tensor, count: int) -> Tensor:
    """Sorted places of the `count` entries of largest magnitude, int32; of equal ones those that come first."""
    order = matrix.abs().flatten().sort(descending=True, stable=True).indices
    return order[:count].sort().values.int()


def random_entries(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Sorted places, int32, on the CPU: uniform among all subsets of `count` of `total`."""
    return torch.randperm(total, generator=generator)[:count].sort().values.int()


def with_entries(base: Tensor | None, scale: float, values: Tensor, positions: Tensor, shape: Sides) -> Tensor:
    """scale·base + scatter(positions, values), a new tensor of `shape`; a missing base counts as 0."""
    whole = values.new_zeros(shape) if base is None else base * scale
    whole.view(-1).index_add_(0, positions.long(), values.to(whole.dtype))
    return whole


class _Product(torch.autograd.Function):
    """x (s·W + scatter(I, v))ᵀ without bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, scale: float, values: Tensor, positions: Tensor, shape: Sides
    ) -> Tensor:
        ctx.save_for_backward(x, weight, values, positions)
        ctx.scale, ctx.shape = scale, shape
        return x @ with_entries(weight, scale, values, positions, shape).T

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outputs
        x, weight, values, positions = ctx.saved_tensors
        to_x = g @ with_entries(weight, ctx.scale, values, positions, ctx.shape)
        gradient = g.flatten(0, -2).T @ x.flatten(0, -2)
        return to_x, None, None, gradient.flatten()[positions.long()], None, None


def entries_product(
    x: Tensor, weight: Tensor | None, scale: float, values: Tensor, positions: Tensor, shape: Sides
) -> Tensor:
    """(…, n) → (…, m), with gradients for x and the values."""
    product: Tensor = _Product.apply(x, weight, scale, values, positions, shape)  # type: ignore[no-untyped-call]
    return product


def new_positions(count: int, like: nn.Linear, name: str) -> nn.Parameter:
    """Where places are kept: a frozen parameter, so that stage 3 shards it as it shards a basis."""
    if like.weight.numel() >= 2**31:
        raise SpecError(f"method.targets: {name} has {like.weight.numel()} entries, too many for 32-bit indices")
    places = torch.zeros(count, dtype=torch.int32, device=like.weight.device)
    return nn.Parameter(places, requires_grad=False)


class EntriesLinear(FrozenLinear):
    """W frozen, k entries trained from 0 beside it: what GaSare and GoSare train in."""

    def __init__(self, linear: nn.Linear, name: str, density: float) -> None:
        super().__init__(linear, name)
        self.count = entry_count(density, self.rows, self.columns)
        self.values = nn.Parameter(linear.weight.new_zeros(self.count))
        self.positions = new_positions(self.count, linear, name)

    @property
    def core(self) -> nn.Parameter:
        return self.values

    def apart_product(self, x: Tensor) -> Tensor:
        y = entries_product(x, self.weight, self.scale, self.values, self.positions, self.shape)
        return self.with_bias(y)

    def from_gradient(self, gradient: Tensor) -> tuple[Tensor, ...]:
        return (gradient.flatten()[self.positions.long()].to(self.values),)

    def add_change(self, shards: Shards, keep: float) -> None:
        shards.add_entries(self.weight, keep, self.positions, self.values)

    def change(self, read: Read) -> Tensor:
        return with_entries(None, 1.0, wide(read(self.values)), read(self.positions), self.shape)

    # ------------------------------------------------------------------------------------------------- at a switch

    def empty_choice(self, like: Tensor) -> Tensor:
        return torch.empty(self.count, dtype=torch.int32, device=like.device)

    def fallback(self, generator: torch.Generator) -> Tensor:
        return random_entries(self.rows * self.columns, self.count, generator)

    def energy(self, gradient: Tensor, choice: Tensor) -> float:
        return share_kept(gradient.flatten()[choice.long()], gradient)

    def install(self, choice: Tensor, shards: Shards, carry: bool) -> None:
        """Give the merged layer its new entries. The moments of those that stay are kept, whatever `carry`;
        new ones start at 0 (algorithm 5: M ← β₁ S⊙M + (1−β₁)R). Collective."""
        places = shards.read(self.positions)
        stays = torch.isin(choice, places) if self.ready else torch.zeros_like(choice, dtype=torch.bool)
        # Both sorted: where each entry that stays stood before.
        before = torch.searchsorted(places, choice[stays])
        for key in shards.moments_of(self.values):
            old = shards.read_moment(self.values, key)
            new = torch.zeros_like(old)
            new[stays] = old[before]
            shards.write_moment(self.values, key, new)
        shards.write(self.positions, choice)
        self.ready = True
