"""Layers with both factors trained: W_eff = W + s·B A, with W frozen or missing, and two relatives.

LoRA, ReLoRA, LORO fine-tuning      W frozen
lowrank, LORO pre-training          no W: nothing of the size m·n exists
DoRA                                W_eff = g ⊙ (W + s·B A) / ‖W + s·B A‖, row by row, g (m,) trained
SLTrain                             W_eff = s·B A + scatter(I, v), v trained on a fixed support
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.lowrank.adapted import Adapted, Read, whole_in_this_process
from trainer.lowrank.beside import keeps_digits, product_beside, together
from trainer.lowrank.entries import entries_product, new_positions, random_entries, with_entries
from trainer.lowrank.linalg import wide
from trainer.methodconfig import entry_count


class FactoredLinear(Adapted):
    """`factor_scale` is s. B (m, r) and A (r, n) are given, whole, in float32."""

    weight: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, name: str, b: Tensor, a: Tensor, factor_scale: float, keep_weight: bool
    ) -> None:
        super().__init__(linear, name)
        self.factor_scale = factor_scale
        if keep_weight:
            linear.weight.requires_grad_(False)
        self.register_parameter("weight", linear.weight if keep_weight else None)  # type: ignore[arg-type]
        self.B = nn.Parameter(b.to(linear.weight))
        self.A = nn.Parameter(a.to(linear.weight))

    def product(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return self.with_bias(product_beside(x, self.weight, self.B, self.A, self.factor_scale))
        y = functional.linear(functional.linear(x, self.A), self.B)
        return self.with_bias(y if self.factor_scale == 1.0 else y * self.factor_scale)

    def trained(self) -> list[nn.Parameter]:
        return [self.B, self.A]

    def effective(self, read: Read) -> Tensor:
        change = (wide(read(self.B)) @ wide(read(self.A))).mul_(self.factor_scale)
        return change if self.weight is None else change.add_(wide(read(self.weight)))


class MagnitudeLinear(FactoredLinear):
    """DoRA. The norm is a constant for the backward pass (its section 4.3)."""

    def __init__(self, linear: nn.Linear, name: str, b: Tensor, a: Tensor, factor_scale: float) -> None:
        super().__init__(linear, name, b, a, factor_scale, keep_weight=True)
        self.magnitude = nn.Parameter(row_norms(linear.weight.detach()).to(linear.weight))

    def product(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        with torch.no_grad():
            formed = None
            if keeps_digits(self.weight):
                formed = together(self.weight, self.B, self.A, self.factor_scale)
            norms = row_norms(super().effective(whole_in_this_process) if formed is None else formed)
        y = product_beside(x, self.weight, self.B, self.A, self.factor_scale, formed)
        # Divided wide and rounded once.
        return self.with_bias(y * (self.magnitude / norms).to(y))

    def trained(self) -> list[nn.Parameter]:
        return [self.B, self.A, self.magnitude]

    def effective(self, read: Read) -> Tensor:
        direction = super().effective(read)
        return direction * (wide(read(self.magnitude)) / row_norms(direction))[:, None]


class SparseFactoredLinear(FactoredLinear):
    """SLTrain: v ~ U(±1/√n) on a support drawn once (its section 3.3)."""

    def __init__(
        self,
        linear: nn.Linear,
        name: str,
        b: Tensor,
        a: Tensor,
        factor_scale: float,
        density: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(linear, name, b, a, factor_scale, keep_weight=False)
        count = entry_count(density, self.rows, self.columns)
        self.positions = new_positions(count, linear, name)
        self.positions.data.copy_(random_entries(self.rows * self.columns, count, generator))
        uniform = torch.rand(count, generator=generator) * 2 - 1
        self.values = nn.Parameter((uniform / self.columns**0.5).to(linear.weight))

    def product(self, x: Tensor) -> Tensor:
        return super().product(x) + entries_product(x, None, 1.0, self.values, self.positions, self.shape)

    def trained(self) -> list[nn.Parameter]:
        return [self.B, self.A, self.values]

    def effective(self, read: Read) -> Tensor:
        return with_entries(super().effective(read), 1.0, read(self.values), read(self.positions), self.shape)


def row_norms(matrix: Tensor) -> Tensor:
    """(m, n) → (m,), in float32 or wider, and above 0."""
    norms: Tensor = torch.linalg.vector_norm(wide(matrix), dim=1)
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)


def xavier(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns), float32: Gaussian of variance 2 / (rows + columns) (Glorot and Bengio 2010)."""
    deviation: float = (2.0 / (rows + columns)) ** 0.5
    return torch.randn(rows, columns, generator=generator) * deviation


def kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns), float32: uniform in ±1/√columns, which is He's with a = √5, as LoRA's code initialises A."""
    bound: float = columns**-0.5
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * bound
