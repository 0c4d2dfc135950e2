"""Held-out batches, shared out over the ranks, each of which makes as many forward passes."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def share(items: Sequence[Item]) -> Iterator[tuple[Item, bool]]:
    """(this rank's item, whether it counts) for as many rounds on every rank; what does not count fills a round up."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for first in range(0, len(items), world):
        counts = first + rank < len(items)
        yield items[first + rank if counts else 0], counts


def totals(items: Sequence[Item], figures: Callable[[Item], Sequence[float]], device: torch.device) -> list[float]:
    """The figures of every item, added up over items and ranks. Collective."""
    added: torch.Tensor | None = None
    for item, counts in share(items):
        found = torch.tensor([*figures(item)], dtype=torch.float64)
        added = torch.zeros_like(found) if added is None else added
        if counts:
            added += found
    assert added is not None, "there is something held out"
    added = added.to(device)
    dist.all_reduce(added)
    return [float(value) for value in added]
