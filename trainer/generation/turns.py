"""One thread that does what is asked of it, in turn, and a short queue. Imports no torch."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Full(Exception):
    """As many wait as may."""


class Turn:
    """One request. `gone` is set when nobody waits for its answer any more."""

    def __init__(self) -> None:
        self.gone = threading.Event()


class Turns:
    def __init__(self, waiting: int) -> None:
        """At most `waiting` besides the one that has its turn."""
        self._most = waiting + 1
        self._turns: set[Turn] = set()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generation")

    def __len__(self) -> int:
        return len(self._turns)

    def take(self, work: Callable[[Turn], None]) -> Turn:
        """`work` is called with the turn when that has come, unless its client has gone before. Raises Full."""
        turn = Turn()
        with self._lock:
            if len(self._turns) >= self._most:
                raise Full
            self._turns.add(turn)
        self._thread.submit(self._do, turn, work)
        return turn

    def close(self) -> None:
        """Ends what is under way, and waits for it."""
        with self._lock:
            for turn in self._turns:
                turn.gone.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _do(self, turn: Turn, work: Callable[[Turn], None]) -> None:
        try:
            if not turn.gone.is_set():
                work(turn)
        finally:
            with self._lock:
                self._turns.discard(turn)
