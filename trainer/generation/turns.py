"""One thread that does what is asked of it, and a short queue. Imports no torch.

Whose request was done last gives way to others that wait; else it goes by who came first.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Full(Exception):
    """As many are under way or wait as may."""


class FullOfOne(Full):
    """As many of one owner's."""


class Turn:
    """One request. `gone` is set when nobody waits for its answer any more."""

    def __init__(self, work: "Callable[[Turn], None]", owner: str) -> None:
        self.work, self.owner = work, owner
        self.gone = threading.Event()


class Turns:
    def __init__(self, waiting: int, per_owner: int) -> None:
        """At most `waiting` besides the one that has its turn; of these `per_owner` of one, the one under way included.
        What has no owner is nobody's."""
        self._most, self._per_owner = waiting + 1, per_owner
        self._waiting: list[Turn] = []
        self._current: Turn | None = None
        self._latest = ""  # whose turn it was last
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generation")

    def __len__(self) -> int:
        return len(self._all())

    def take(self, work: Callable[[Turn], None], owner: str = "") -> Turn:
        """`work` is called with the turn when that has come, unless it was left before. Raises Full."""
        turn = Turn(work, owner)
        with self._lock:
            under_way = self._all()
            if len(under_way) >= self._most:
                raise Full
            if owner and sum(other.owner == owner for other in under_way) >= self._per_owner:
                raise FullOfOne
            self._waiting.append(turn)
        self._thread.submit(self._do_next)
        return turn

    def withdraw(self, turn: Turn) -> bool:
        """True if it still waited: it never comes then."""
        with self._lock:
            if turn not in self._waiting:
                return False
            self._waiting.remove(turn)
            return True

    def leave(self, turn: Turn) -> None:
        """Nobody waits for it any more."""
        turn.gone.set()
        self.withdraw(turn)

    def close(self) -> None:
        """Ends what is under way, and waits for it."""
        with self._lock:
            for turn in self._all():
                turn.gone.set()
            self._waiting.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _all(self) -> list[Turn]:
        return [*self._waiting, *([self._current] if self._current else [])]

    def _do_next(self) -> None:
        with self._lock:
            if not self._waiting:
                return
            others = (turn for turn in self._waiting if turn.owner != self._latest)
            turn = next(others, self._waiting[0])
            self._waiting.remove(turn)
            self._current, self._latest = turn, turn.owner
        try:
            turn.work(turn)
        finally:
            with self._lock:
                self._current = None
