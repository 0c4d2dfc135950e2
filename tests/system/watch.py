"""A thread that looks all the while how many trainers are alive: of a job, and on a worker's GPUs."""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.system.processes import Identity, TrainerProcess, alive, trainer_processes

EVERY = 0.05


@dataclass
class Overlap:
    """Two trainers where only one may be; `where` is a job or a worker. Times are Unix seconds."""

    since: float
    until: float
    where: str
    trainers: tuple[Identity, ...]
    processes: tuple[str, ...]


@dataclass
class Groups:
    """Which trainer a process belongs to: that of its attempt, else of its parent, remembered for when that is gone."""

    of: dict[Identity, Identity] = field(default_factory=dict)
    of_attempt: dict[tuple[str, str], Identity] = field(default_factory=dict)

    def add(self, found: Iterable[TrainerProcess]) -> dict[Identity, list[TrainerProcess]]:
        """The processes found now, by trainer. A trainer is named by its first process."""
        by_pid = {one.process.pid: one for one in found}
        groups: dict[Identity, list[TrainerProcess]] = {}
        for one in by_pid.values():
            groups.setdefault(self._root(one, by_pid), []).append(one)
        return groups

    def _root(self, one: TrainerProcess, by_pid: dict[int, TrainerProcess]) -> Identity:
        if one.attempt:
            return self.of_attempt.setdefault((one.job_id, one.attempt), one.identity)
        if one.identity not in self.of:
            parent = by_pid.get(one.parent)
            self.of[one.identity] = self._root(parent, by_pid) if parent else one.identity
        return self.of[one.identity]


class Watch(threading.Thread):
    """With `with`: watches every run below `runs`."""

    def __init__(self, runs: Path) -> None:
        super().__init__(daemon=True)
        self.runs = runs
        self.looks = self.busy = 0  # how often it looked, and how often a trainer was there
        self.most: dict[str, int] = {}  # by job and by worker, the most trainers at once
        self.overlaps: list[Overlap] = []
        self._groups = Groups()
        self._over = threading.Event()
        self._failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self._over.wait(EVERY):
                self.look()
        except Exception as error:  # noqa: BLE001  (told by __exit__: a watch that has ended sees nothing)
            self._failure = error

    def look(self) -> None:
        groups = self._groups.add(trainer_processes(self.runs))
        self.looks += 1
        self.busy += bool(groups)
        places: dict[str, dict[Identity, list[TrainerProcess]]] = {}
        for root, members in groups.items():
            for where in {members[0].job_id, members[0].worker} - {""}:
                places.setdefault(where, {})[root] = members
        for where, trainers in places.items():
            if len(trainers) > 1:
                # One may have ended while the other was looked at: who lives now was there together with the others.
                trainers = {r: living for r, members in trainers.items() if (living := list(filter(_alive, members)))}
            self.most[where] = max(self.most.get(where, 0), len(trainers))
            if len(trainers) > 1:
                named = tuple(f"{m.process.pid} {m.role} of {m.job_id}" for ms in trainers.values() for m in ms)
                self._note(Overlap(time.time(), time.time(), where, tuple(trainers), named))

    def _note(self, seen: Overlap) -> None:
        """Once, however often it is looked at."""
        for known in self.overlaps:
            if (known.where, known.trainers) == (seen.where, seen.trainers):
                known.until = seen.until
                return
        self.overlaps.append(seen)

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        if self._failure is not None:
            raise self._failure


def _alive(one: TrainerProcess) -> bool:
    return alive(one.process)
