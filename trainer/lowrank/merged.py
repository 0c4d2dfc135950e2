"""The merged form: a frozen weight that is W_eff itself, and a core that is 0 whenever a forward pass begins.

    forward     y = x W_effᵀ                                   what a plain linear layer costs
    backward    ∂L/∂x = g W_eff,   ∂L/∂core from (g, x)        never G = gᵀx (m, n), where a basis allows it
    after the optimizer's step     W_eff ← (1 − ηλ) W_eff + Δ(core),   core ← 0

The core starts every step at 0, so the optimizer leaves its update in it, and nothing else; moments are the core's as
in the factored form, and W_eff goes the same way. With b tokens a rank and a basis of rank r that is 4bmn + 2br(m+n)
+ 2rmn FLOPs, where the full layer takes 6bmn and the factored form 4bmn + 4brm + 6brn.
See docs/decisions/0021.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Any, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outputs
        x, weight = ctx.saved_tensors
        layer = ctx.layer
        to_x = g @ weight if ctx.needs_input_grad[0] else None
        if layer.probe is not None:
            # Nobody takes the cores' gradients.
            return to_x, *(None,) * (2 + len(layer.trained()))
        g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        if layer.switching is not None:
            return to_x, None, None, *layer.switching.core_gradients(layer, g, x)
        return to_x, None, None, *layer.core_gradients(g, x)


def merged_product(x: Tensor, layer: Any) -> Tensor:
    """x W_effᵀ (…, m) without bias; in the backward pass the layer's `core_gradients` for what it trains."""
    layer.calls += 1
    y: Tensor = _Product.apply(x, layer.weight, layer, *layer.trained())  # type: ignore[no-untyped-call]
    return y
