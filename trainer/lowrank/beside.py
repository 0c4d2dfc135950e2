"""The product with a frozen matrix and trained factors beside it: y = x Vᵀ with V = W + s·B A.

Autograd alone runs each of the three products and each sum by itself. Here, with b rows of x, there are two ways:

    whole     V is formed for the pass and dropped after it    4bmn + 4br(m+n) + 4rmn FLOPs a step
    apart     x Wᵀ + s·(x Aᵀ) Bᵀ, summed where it is made       4bmn + 6br(m+n)

    ∂L/∂B = s·gᵀ(x Aᵀ)    ∂L/∂A = s·(g B)ᵀ x    ∂L/∂x = g V    in both

The whole V is the cheaper where b (m + n) > 2mn, and is only formed in float32 or wider: in bf16 it would round away
what B A has learnt beside a W that is larger.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, b: Tensor, a: Tensor, scale: float, whole: bool, formed: Tensor | None
    ) -> Tensor:
        ctx.scale, ctx.whole = scale, whole
        if whole:
            ctx.save_for_backward(x, weight, b, a)
            return x @ (together(weight, b, a, scale) if formed is None else formed).T
        inner = x @ a.T
        ctx.save_for_backward(x, weight, b, a, inner)
        return _plus(x @ weight.T, inner, b.T, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outputs
        x, weight, b, a, *kept = ctx.saved_tensors
        inner = kept[0] if kept else x @ a.T
        outer = g @ b
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = g @ together(weight, b, a, ctx.scale) if ctx.whole else _plus(g @ weight, outer, a, ctx.scale)
        return to_x, None, (g.T @ inner).mul_(ctx.scale), (outer.T @ x).mul_(ctx.scale), None, None, None


def together(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """W + s·B A, in the types that they have."""
    return torch.addmm(weight, b, a, alpha=scale)


def keeps_digits(weight: Tensor) -> bool:
    """Whether V may be formed in the weight's type."""
    return torch.finfo(weight.dtype).bits >= 32


def whole_is_cheaper(rows: int, weight: Tensor) -> bool:
    """Whether V is to be formed for `rows` rows of x."""
    m, n = weight.shape
    return keeps_digits(weight) and rows * (m + n) > 2 * m * n


def product_beside(
    x: Tensor, weight: Tensor, b: Tensor, a: Tensor, scale: float, formed: Tensor | None = None
) -> Tensor:
    """(…, n) → (…, m), without bias; W (m, n) has no gradient, B (m, r) and A (r, n) have.

    `formed`: V, where the caller has it anyway.
    """
    rows = x.reshape(-1, x.shape[-1])
    whole = formed is not None or whole_is_cheaper(rows.shape[0], weight)
    y: Tensor = _Product.apply(rows, weight, b, a, scale, whole, formed)  # type: ignore[no-untyped-call]
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _plus(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """y + s·left·right, in the place of y."""
    return y.addmm_(left, right, alpha=scale)
