"""The full gradients of the target matrices, asked for only when a basis depends on them.

The step's own micro-batches run forward once more, and autograd is asked for the gradient of a zero that was added to
nothing: the backward pass walks through every target layer, where G = gᵀx (m, n) is formed from the gradient g of the
layer's output and its input x, and reaches no parameter. So neither .grad nor any of DeepSpeed's hooks is touched,
which is why this works unchanged at every ZeRO stage. x is saved through autograd, so activation checkpointing
recomputes it instead of keeping it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainer.lowrank.linalg import wide


class Probe:
    """Collects the gradients of one pass over a step's micro-batches, summed, in float32 or wider."""

    def __init__(self, device: torch.device) -> None:
        self.gradients: dict[str, Tensor] = {}
        # What autograd.grad is asked for: an input of every capture, and of nothing else.
        self.root = torch.zeros((), device=device, requires_grad=True)

    def add(self, name: str, gradient: Tensor) -> None:
        if name in self.gradients:
            self.gradients[name] += gradient
        else:
            self.gradients[name] = gradient


class _Capture(torch.autograd.Function):
    """Identity on y; in the backward pass gives G to the probe."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, root: Tensor, name: str, probe: Probe) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name, ctx.probe = name, probe
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outputs
        (x,) = ctx.saved_tensors
        ctx.probe.add(ctx.name, wide(g.flatten(0, -2)).T @ wide(x.flatten(0, -2)))
        return g, None, torch.zeros((), device=g.device), None, None


def capture(y: Tensor, x: Tensor, name: str, probe: Probe) -> Tensor:
    """y (…, m), unchanged; x (…, n) is the input of the layer `name` that made it."""
    same: Tensor = _Capture.apply(y, x, probe.root, name, probe)  # type: ignore[no-untyped-call]  # torch's own
    return same


def full_gradients(model: Any, layers: Iterable[Any], micro_batches: list[Tensor]) -> dict[str, Tensor]:
    """This rank's mean gradient of the loss over its micro-batches, by layer name: (m, n), float32 or wider.

    `model` is the module inside the engine and returns an object with `.loss`. Nothing is reduced over ranks.
    """
    layers = list(layers)
    probe = Probe(micro_batches[0].device)
    for layer in layers:
        layer.probe = probe
    try:
        for tokens in micro_batches:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(micro_batches)
            torch.autograd.grad(loss, probe.root)
    finally:
        for layer in layers:
            layer.probe = None
    return probe.gradients
