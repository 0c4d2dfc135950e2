"""The full gradients of the target matrices, one after the other, asked for only when a subspace depends on them.

The step's own micro-batches run forward once more, and autograd is asked for the gradient of a zero that was added to
nothing: the backward pass walks through every target layer, where G = gᵀx (m, n) is formed from the gradient g of the
layer's output and its input x, and reaches no parameter. So neither .grad nor any of DeepSpeed's hooks is touched,
which is why this works unchanged at every ZeRO stage. x is saved through autograd, so activation checkpointing
recomputes it instead of keeping it.

Nobody keeps the gradients of a whole model. With one micro-batch a step, each is handed on in the middle of the
backward pass, and gone before the next is formed. With several they have to be added up: then the layers are taken in
groups, and the micro-batches are gone through once for each group.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.batch import Batch
from trainer.lowrank.linalg import wide

# (layer, this rank's mean gradient, or None where no token has reached the layer)
Give = Callable[[Any, Tensor | None], None]
AtOnce = int | Literal["block"]


class Probe:
    """Hands on the gradient of every capture, by the layer's name: (m, n), float32 or wider."""

    def __init__(self, device: torch.device, take: Callable[[str, Tensor], None]) -> None:
        self.take = take
        # The captures of the forward pass, in order.
        self.reached: list[str] = []
        # What autograd.grad is asked for: an input of every capture, and of nothing else.
        self.root = torch.zeros((), device=device, requires_grad=True)


class _Capture(torch.autograd.Function):
    """Identity on y; in the backward pass gives G to the probe."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, root: Tensor, name: str, probe: Probe) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name, ctx.probe = name, probe
        probe.reached.append(name)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outputs
        (x,) = ctx.saved_tensors
        ctx.probe.take(ctx.name, wide(g.flatten(0, -2)).T @ wide(x.flatten(0, -2)))
        return g, None, torch.zeros((), device=g.device), None, None


def capture(y: Tensor, x: Tensor, name: str, probe: Probe) -> Tensor:
    """y (…, m), unchanged; x (…, n) is the input of the layer `name` that made it."""
    same: Tensor = _Capture.apply(y, x, probe.root, name, probe)  # type: ignore[no-untyped-call]  # torch's own
    return same


def each_gradient(model: Any, layers: Sequence[Any], micro_batches: list[Batch], at_once: AtOnce, give: Give) -> None:
    """Call `give` once for every layer, in the same order on all ranks, with the gradient of the mean weighted loss
    of this rank's micro-batches. Nothing is reduced over ranks, but `give` may. Collective.

    `model` is the module inside the engine and returns an object with `.loss`. `at_once`: how many layers' gradients
    are added up at a time where there are several micro-batches; `block`: those of one block of the model.
    """
    if len(micro_batches) == 1:
        _in_the_backward_pass(model, layers, micro_batches[0], give)
        return
    for group in _groups(layers, at_once):
        sums = _Sums()
        with _probing(group, micro_batches[0].device, sums.add) as probe:
            for batch in micro_batches:
                _backward(_loss(model, batch) / len(micro_batches), probe)
        for layer in group:
            give(layer, sums.pop(layer.name))


def _in_the_backward_pass(model: Any, layers: Sequence[Any], batch: Batch, give: Give) -> None:
    remaining = {layer.name: layer for layer in layers}
    sums = _Sums()
    with _probing(layers, batch.device, sums.add) as probe:
        loss = _loss(model, batch)
        if _once_each_on_all_ranks(probe.reached):
            probe.take = lambda name, gradient: give(remaining.pop(name), gradient)
        _backward(loss, probe)
    for layer in remaining.values():
        give(layer, sums.pop(layer.name))


class _Sums:
    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient

    def pop(self, name: str) -> Tensor | None:
        return self._sums.pop(name, None)


@contextmanager
def _probing(layers: Sequence[Any], device: torch.device, take: Callable[[str, Tensor], None]) -> Iterator[Probe]:
    probe = Probe(device, take)
    for layer in layers:
        layer.probe = probe
    try:
        yield probe
    finally:
        for layer in layers:
            layer.probe = None


def _loss(model: Any, batch: Batch) -> Tensor:
    return batch.weighted(model(**batch.inputs).loss)


def _backward(loss: Tensor, probe: Probe) -> None:
    # Unused where none of the tokens reached any of the layers.
    torch.autograd.grad(loss, probe.root, allow_unused=True)


def _once_each_on_all_ranks(reached: list[str]) -> bool:
    """Whether every rank's backward pass will meet the same layers in the same order, each once.

    Else (experts that only some ranks' tokens reach) a rank that reduced a gradient might wait for ever.
    """
    mark = zlib.crc32(",".join(reached).encode()) if len(set(reached)) == len(reached) else -1
    marks = torch.tensor([mark, -mark], dtype=torch.int64)
    if dist.get_backend() == "nccl":
        marks = marks.cuda()
    dist.all_reduce(marks, op=dist.ReduceOp.MAX)
    highest, lowest = int(marks[0]), -int(marks[1])
    return highest == lowest >= 0


def _groups(layers: Sequence[Any], at_once: AtOnce) -> list[list[Any]]:
    """Runs of `at_once` layers, or of those that lie in the same numbered block (model.layers.3)."""
    if at_once != "block":
        return [list(layers[first : first + at_once]) for first in range(0, len(layers), at_once)]
    groups: dict[str, list[Any]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        groups.setdefault(".".join(parts[: number + 1]), []).append(layer)
    return list(groups.values())
