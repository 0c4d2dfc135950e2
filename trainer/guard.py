"""When the loss goes wrong: what counts as wrong, and what is done about it. Imports no torch.

A step is high when

    loss > mean + spike · max(std, 0.01 · |mean|)

over the last `window` losses that were not high, from half a window on. `patience` high steps in a row are a spike.

Whether there is one depends on the losses so far and on nothing else. They are means over all ranks, so that all ranks
decide alike; and what is known of them is part of a checkpoint: a run that was resumed decides like one that was not.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Of the mean: a loss that hardly varies is not high for hardly varying more.
_LEAST_DEVIATION = 0.01
# So that one deviation is never nothing, not even where every loss was 0.
_TINY = 1e-12


class GuardSpec(BaseModel):
    """What a run does when its loss goes wrong; docs/guard.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    on_divergence: Literal["stop", "roll_back"] = Field(
        default="stop",
        description="when the loss, in training or held-out, or the gradient's norm is no number, or a loss too large "
        "for a perplexity: stop as failed, or go on from an earlier checkpoint with a smaller learning rate",
    )
    on_spike: Literal["report", "stop", "roll_back"] = Field(
        default="report", description="when the loss stays far above what is usual; report: say so and train on"
    )
    spike: float = Field(
        default=8.0,
        gt=0,
        description="standard deviations of the window's losses above their mean: a loss beyond is high",
    )
    window: int = Field(default=64, ge=8, le=65_536, description="how many of the last ordinary losses are the usual")
    patience: int = Field(default=3, ge=1, description="so many high steps in a row are a spike")
    rate_factor: float = Field(
        default=0.5, gt=0, lt=1, description="what each rollback multiplies the learning rate of all later steps by"
    )
    most_rollbacks: int = Field(default=3, ge=1, description="of the whole run; then it stops as failed")

    @property
    def rolls_back(self) -> bool:
        return "roll_back" in (self.on_divergence, self.on_spike)


@dataclass(frozen=True)
class Spike:
    """`usual`: the window's mean. `deviations`: how far above it the loss is."""

    usual: float
    deviations: float


class Guard:
    """The detector, and what earlier rollbacks have left: how many, and the scale of the rate."""

    def __init__(self, wanted: GuardSpec, state: Mapping[str, Any]) -> None:
        """`state` is what `state` returned; empty for a run that begins."""
        self._wanted = wanted
        self._ordinary: deque[float] = deque(state.get("losses", ()), maxlen=wanted.window)
        self._high = int(state.get("high", 0))
        self.rate_scale = float(state.get("rate_scale", 1.0))
        self.rollbacks = int(state.get("rollbacks", 0))

    def state(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "losses": list(self._ordinary),
            "high": self._high,
            "rate_scale": self.rate_scale,
            "rollbacks": self.rollbacks,
        }

    def observe(self, loss: float) -> Spike | None:
        """Take a step's loss, a number. A spike is told once: the window then starts anew, at the new level."""
        usual, deviation = self._usual()
        known = 2 * len(self._ordinary) >= self._wanted.window
        if not known or loss <= usual + self._wanted.spike * deviation:
            self._ordinary.append(loss)
            self._high = 0
            return None
        self._high += 1
        if self._high < self._wanted.patience:
            return None
        self._ordinary.clear()
        self._high = 0
        return Spike(usual, (loss - usual) / deviation)

    def _usual(self) -> tuple[float, float]:
        """(mean, standard deviation) of the window."""
        if not self._ordinary:
            return 0.0, _TINY
        # Exact sums: the same for the same losses, wherever in memory they lie.
        mean = math.fsum(self._ordinary) / len(self._ordinary)
        variance = math.fsum((loss - mean) ** 2 for loss in self._ordinary) / len(self._ordinary)
        return mean, max(math.sqrt(variance), _LEAST_DEVIATION * abs(mean), _TINY)
