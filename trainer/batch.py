"""A micro-batch: what one rank's model is called with in one forward pass, and what its loss counts for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of the model's output: how many of the batch's targets it has right, as a tensor of one element.
CountRight = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """`inputs` are the model's own arguments by name, labels among them: it answers with an object that has `.loss`.

    That loss is the mean over the batch's own targets (tokens, or examples). A step's is the mean over the targets of
    all ranks' batches: `weight` makes it so, n·R·M/N with n of a step's N targets in this batch, R ranks and M batches
    of each rank, since engines average over both. Weight 1 multiplies nothing. A batch that only fills a rank's number
    up has weight 0, and must still have a finite loss.
    """

    inputs: dict[str, Any]
    weight: float = 1.0
    targets: int = 0
    right: CountRight | None = None

    @classmethod
    def of_tokens(cls, tokens: Tensor) -> "Batch":
        """(batch, sequence) ids of which every one is to be predicted from those before it."""
        return cls({"input_ids": tokens, "labels": tokens, "use_cache": False})

    @property
    def tokens(self) -> Tensor:
        ids: Tensor = self.inputs["input_ids"]
        return ids

    @property
    def device(self) -> torch.device:
        return next(value.device for value in self.inputs.values() if isinstance(value, Tensor))

    def weighted(self, loss: Tensor) -> Tensor:
        """The loss as it counts in the mean over a step's batches and ranks."""
        return loss if self.weight == 1 else loss * self.weight
