"""A change of subspace inside the step's own backward pass, for merged layers on a single rank.

A merged layer's forward pass does not know the basis, and its core is 0 whatever the basis: so the basis may change as
late as when the layer's own gradient passes, and be chosen from it. No second pass over the step's batch is needed, and
no more than one full gradient exists at a time.

On several ranks a gradient is the mean over all of them, and what is chosen must reach all: a layer's gradients would
wait for a decomposition that only one rank makes. There `trainer.lowrank.switch` shares the work out.
"""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trainer.lowrank.linalg import share_kept, wide
from trainer.lowrank.switch import Choose, SwitchReport, decided, generator_for
from trainer.zero import Shards


class SwitchInBackward:
    """Between `arm` and `report` every layer whose gradient passes gets its next subspace first."""

    def __init__(
        self, layers: Sequence[Any], choose: Choose, shards: Shards, seed: int, step: int, carry: bool = False
    ) -> None:
        self._layers, self._choose, self._shards = layers, choose, shards
        self._seed, self._step, self._carry = seed, step, carry
        self._waiting = {layer.name: index for index, layer in enumerate(layers)}
        self._seconds, self._energy, self._fallbacks = 0.0, 0.0, 0

    def arm(self) -> None:
        for layer in self._layers:
            layer.switching = self

    def report(self) -> SwitchReport:
        """After the backward pass. A layer that no token has reached keeps its subspace, and is counted."""
        for layer in self._layers:
            layer.switching = None
            if layer.name in self._waiting:
                self._fallbacks += 1
                generator = generator_for(self._seed, self._step, self._waiting[layer.name])
                self._set(layer, None if layer.ready else layer.fallback(generator))
        renewed = len(self._layers) - self._fallbacks
        return SwitchReport(self._seconds, self._energy / renewed if renewed else None, self._fallbacks)

    def core_gradients(self, layer: Any, g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Those of the new subspace, from the gradient g (b, m) of the layer's output and its input x (b, n)."""
        began = time.perf_counter()
        gradient = wide(g).T @ wide(x)
        index = self._waiting.pop(layer.name)
        decision = decided(self._choose, layer, gradient, self._seed, self._step, index)
        self._set(layer, decision.subspace)
        found: tuple[Tensor, ...] = layer.from_gradient(gradient)
        if decision.failed:
            self._fallbacks += 1
        else:
            # The core's gradient comes first, and is what the new subspace keeps.
            self._energy += share_kept(found[0], gradient)
        self._seconds += time.perf_counter() - began
        return found

    def _set(self, layer: Any, subspace: Tensor | None) -> None:
        if subspace is not None:
            buffer = layer.empty_choice(self._shards.example)
            layer.install(buffer.copy_(subspace), self._shards, self._carry)
