"""What takes the place of an nn.Linear in a low-rank method, and the replacing.

Every such layer stands for one matrix W_eff (m, n), m outputs and n inputs, and says what it is at any moment: at a
switch, in an export, in a test. It never reads its own size off a parameter, which stage 3 leaves empty.
"""

import zlib
from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.errors import SpecError
from trainer.lowrank.linalg import wide
from trainer.lowrank.merged import merged_product
from trainer.lowrank.probe import Probe, capture
from trainer.lowrank.rounding import stochastic_bf16
from trainer.lowrank.targets import target_linears
from trainer.zero import Shards, shape_of

# A parameter's whole value; `Shards.read` in an engine. Collective there.
Read = Callable[[Any], Tensor]


def whole_in_this_process(parameter: Any) -> Tensor:
    """The `Read` of a model without an engine."""
    value: Tensor = parameter.detach()
    return value


class Adapted(nn.Module):
    """`name` is the linear's name in the model. `bias` is the linear's own parameter."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.rows, self.columns = self.shape = (linear.weight.shape[0], linear.weight.shape[1])
        self.name = name
        self.bias = linear.bias
        self.probe: Probe | None = None
        # Where frozen weights are rounded at random: the run's seed.
        self.rounding_seed: int | None = None

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x W_effᵀ + bias: (…, n) → (…, m)."""

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """What the method trains here; the bias is not part of it."""

    @abstractmethod
    def effective(self, read: Read) -> Tensor:
        """W_eff (m, n), float32 or wider."""

    def with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.probe is None else capture(y, x, self.name, self.probe)

    def write_frozen(self, weight: Tensor, value: Tensor, shards: Shards, step: int) -> None:
        """Set a frozen weight, rounded as the run wants it. Collective."""
        if self.rounding_seed is not None and weight.dtype == torch.bfloat16:
            value = stochastic_bf16(value, self.rounding_seed, zlib.crc32(self.name.encode()), step)
        shards.write(weight, value)

    def state(self) -> dict[str, Any]:
        """What is neither parameter nor buffer and is needed to resume; JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)


class FrozenLinear(Adapted):
    """W frozen, plus a change Δ that is trained in a subspace and merged at a switch: W_eff = s·W + Δ.

    `scale` is s, the decoupled weight decay that W has collected; W is written only at a switch. Where the run wants it
    `merged`, W is W_eff itself, brought up to date after every step (`absorb`): s is 1, and Δ is 0 between steps.
    `ready` says whether the layer has been given a subspace yet.
    """

    merged = False
    # Of merged layers: how often the forward pass has come by since this was last set to 0, and what changes the
    # subspace in the backward pass (`trainer.lowrank.inbackward`).
    calls = 0
    switching: Any = None

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__(linear, name)
        self.weight = linear.weight
        self.weight.requires_grad_(False)
        self.scale = 1.0
        self.ready = False

    @abstractmethod
    def change(self, read: Read) -> Tensor:
        """Δ (m, n), float32 or wider."""

    @property
    @abstractmethod
    def core(self) -> nn.Parameter:
        """The parameter that is trained; Δ = 0 where it is 0."""

    def trained(self) -> list[nn.Parameter]:
        return [self.core]

    def product(self, x: Tensor) -> Tensor:
        return self.with_bias(merged_product(x, self)) if self.merged else self.apart_product(x)

    @abstractmethod
    def apart_product(self, x: Tensor) -> Tensor:
        """`product` from W and Δ, each by itself."""

    @abstractmethod
    def from_gradient(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """∂L/∂θ of what is `trained`, from G (m, n)."""

    def core_gradients(self, g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The same from the gradient g (b, m) of the output and the input x (b, n)."""
        return self.from_gradient(g.T @ x)

    def effective(self, read: Read) -> Tensor:
        # A copy: `read` may have handed out the parameter itself.
        return wide(read(self.weight)).mul(self.scale).add_(self.change(read))

    def frozen_product(self, x: Tensor) -> Tensor:
        """s·x Wᵀ + bias."""
        if self.scale == 1.0:
            return functional.linear(x, self.weight, self.bias)
        return self.with_bias(functional.linear(x, self.weight) * self.scale)

    def merge(self, shards: Shards, step: int) -> None:
        """Δ into W, core ← 0, W_eff as it was, before the 0-based `step`. Collective.

        From the core's fp32 master, not its low-precision copy: what the optimizer has learnt is merged whole. s stays
        apart, W ← W + Δ/s: rounded to bf16 at every switch, a decay below half a unit in the last place would be lost.
        """
        if self.merged:
            return
        if self.scale < 0.5:
            self.write_frozen(self.weight, self.effective(shards.read), shards, step)
            self.scale = 1.0
        else:
            whole = wide(shards.read(self.weight)) + self.change(shards.read) / self.scale
            self.write_frozen(self.weight, whole, shards, step)
        shards.write(self.core, torch.zeros(shape_of(self.core), device=shards.device))

    def absorb(self, shards: Shards, step: int, keep: float) -> None:
        """After the optimizer's `step`: W ← keep·W + Δ, core ← 0. Collective. `keep` is 1 − ηλ."""
        if self.rounding_seed is None and not shards.has_frozen_master(self.weight):
            self.add_change(shards, keep)
        else:
            whole = wide(shards.read(self.weight)).mul(keep).add_(self.change(shards.read))
            self.write_frozen(self.weight, whole, shards, step)
        shards.clear(self.core)

    @abstractmethod
    def add_change(self, shards: Shards, keep: float) -> None:
        """W ← keep·W + Δ in place, rounded to nearest. Collective."""

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "ready": self.ready, "merged": self.merged}

    def load_state(self, state: dict[str, Any]) -> None:
        # A checkpoint's run goes on in the form that it had; before there was a choice all were factored.
        super().load_state({"merged": False} | state)


Make = Callable[[nn.Linear, str, int], Adapted]
OnModule = Callable[[nn.Module], None]


def leave(module: nn.Module) -> None:
    """Nothing is to be done with it."""


def replace_targets(
    model: nn.Module,
    targets: tuple[str, ...],
    make: Make,
    rank: int | None = None,
    fill: OnModule = leave,
    done: OnModule = leave,
    besides: Collection[int] = (),
) -> list[Any]:
    """Put `make(linear, name, index)` in the place of every nn.Linear that `targets` mean, but for those whose weight's
    identity is among `besides`.

    `fill` is called with the linear before, `done` with the new layer after. Returned in the model's order. Raises
    SpecError when a target matches nothing, shares its weight, or has a side below `rank`.
    """
    found = target_linears(model, targets, besides)
    names_of: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(parameter_name)
    layers = []
    for index, (name, linear) in enumerate(found):
        if len(shared := names_of[id(linear.weight)]) > 1:
            raise SpecError(
                f"method.targets: {name} shares its weight with another module ({', '.join(shared)}), which would be "
                f"frozen and merged into; leave {name.rpartition('.')[2]!r} out"
            )
        rows, columns = linear.weight.shape
        if rank is not None and rank > min(rows, columns):
            raise SpecError(
                f"method.rank: rank {rank} is above the smallest side of {name} ({rows}×{columns}); "
                f"choose at most {min(rows, columns)}, or leave it out of method.targets"
            )
        fill(linear)
        layer = make(linear, name, index)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, child, layer)
        done(layer)
        layers.append(layer)
    return layers
