"""In which order a run goes through what it trains on: a new permutation every epoch, a pure function of the seed."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


class Order:
    def __init__(self, seed: int, count: int) -> None:
        self.count = count
        self._seed = seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, index: int) -> int:
        """Which of the `count` is the index-th of the run."""
        epoch, position = divmod(index, self.count)
        return int(self.of_epoch(epoch)[position])

    def of_epoch(self, epoch: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            self._epoch, self._permutation = epoch, generator.permutation(self.count)
        return self._permutation


def groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one perhaps shorter."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
