"""Examples into rows, rows onto ranks and micro-batches: pure functions of their lengths, the same on every rank."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows of at most `limit` tokens, as places in `lengths`: first fit, the longest first.

    Rows come in the order of their first, longest example.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for place in order:
        fits = np.flatnonzero(room[: len(rows)] >= lengths[place])
        if len(fits):
            row = int(fits[0])
            rows[row].append(place)
        else:
            row = len(rows)
            rows.append([place])
            room[row] = limit
        room[row] -= lengths[place]
    return rows


def deal(rows: Sequence[Item], ranks: int, most: int) -> list[list[list[Item]]]:
    """[rank][micro-batch] → rows: for every rank as many micro-batches, as few as hold at most `most` rows each.

    Neighbours stay together, so rows that are in order of their length need little padding; what the ranks do at the
    same time is nearly equal. Where there are fewer rows than batches, some are empty.
    """
    count = -(-len(rows) // (ranks * most)) * ranks
    edges = [index * len(rows) // count for index in range(count + 1)]
    batches = [list(rows[begin:end]) for begin, end in zip(edges, edges[1:], strict=False)]
    return [batches[rank::ranks] for rank in range(ranks)]
