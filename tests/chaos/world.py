"""The stack under test: what is alive in it, what is down on purpose, and what shall be done later."""

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from cli.stack import Stack
from tests.system.postgresql import Postgresql
from tests.system.processes import TrainerProcess, kill, trainer_processes, tree

# Seconds from one start of a process to its next: it may be that it cannot work yet.
_AGAIN = 1.0

Later = tuple[float, int, Callable[[], None]]


@dataclass
class World:
    """`say` prints one line. Times are seconds since the beginning of the campaign."""

    stack: Stack
    server: Postgresql | None
    say: Callable[[str], None]
    specs: tuple[str, ...]  # what users choose from
    began: float = field(default_factory=time.monotonic)
    accepted: dict[str, str] = field(default_factory=dict)  # job id → name of its specification
    cancelled: set[str] = field(default_factory=set)  # asked, and answered
    _started: dict[str, float] = field(default_factory=dict)
    _down: Counter[str] = field(default_factory=Counter)
    _later: list[Later] = field(default_factory=list)
    _order: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.stack.api_url, timeout=5)

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    @property
    def runs(self) -> Path:
        return self.stack.home / "runs"

    # ---------------------------------------------------------------------------------------------------- what is there

    def workers(self) -> list[str]:
        """Names of the workers whose main process lives."""
        return [name for name in self.stack.children if name.startswith("worker") and self.is_up(name)]

    def is_up(self, name: str) -> bool:
        process = self.stack.children[name].process
        return process is not None and process.poll() is None

    def trainers(self) -> list[TrainerProcess]:
        return trainer_processes(self.runs)

    def everything(self) -> list[psutil.Process]:
        """All that this stack has started and that still lives, trainers without parents included."""
        found = [process for name in self.stack.children if self.is_up(name) for process in tree(self.stack.pid(name))]
        found += [one.process for one in self.trainers()]
        return list(dict.fromkeys(found + (self.server.processes if self.server else [])))

    # ----------------------------------------------------------------------------------------------- what is done to it

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._later, (self.now + seconds, next(self._order), act))

    def take_down(self, *names: str, seconds: float) -> None:
        """Nobody starts these again before the seconds have passed; `postgresql` is a name too. Kills nothing."""
        self._down.update(names)
        self.later(seconds, lambda: self._down.subtract(names))

    def kill(self, name: str) -> None:
        self.stack.kill(name)

    def tend(self) -> None:
        """What is due is done, and what is not alive though it should be is started, the database and broker first."""
        while self._later and self._later[0][0] <= self.now:
            heapq.heappop(self._later)[2]()
        if self.server and not self.server.processes and self._down["postgresql"] <= 0:
            self.server.start()
            self.say("postgresql started")
        for name in self.stack.children:
            waits = self.now < self._started.get(name, 0.0) + _AGAIN
            if not self.is_up(name) and self._down[name] <= 0 and not waits:
                self.stack.restart(name)
                self._started[name] = self.now
                self.say(f"{name} started")

    def is_calm(self) -> bool:
        """Nothing is left to be undone."""
        return not self._later

    # ----------------------------------------------------------------------------------------------- what users ask for

    def submit(self, spec: str, body: dict[str, Any]) -> str | None:
        """The new job's id; None where the answer was no 201: then nothing is promised."""
        answer = self.ask("POST", "/v1/jobs", json=body | {"name": spec})
        if answer is None or answer.status_code != 201:
            return None
        job_id = str(answer.json()["id"])
        self.accepted[job_id] = spec
        return job_id

    def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response | None:
        """None where nobody answers."""
        try:
            return self.http.request(method, path, **arguments)
        except httpx.HTTPError:
            return None

    def jobs(self) -> list[dict[str, Any]] | None:
        """Every job that the API lists, the newest first; None where it cannot say."""
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            answer = self.ask("GET", f"/v1/jobs?limit=100{after}")
            if answer is None or answer.status_code != 200:
                return None
            page = answer.json()
            found += page["data"]
            if not page["has_more"]:
                return found
            after = f"&after={page['last_id']}"

    def close(self) -> None:
        self.http.close()


def end(world: World) -> list[psutil.Process]:
    """Stop the stack, and kill what it should have ended; returns that."""
    world.stack.stop()
    left = [one.process for one in world.trainers()]
    kill(left)
    return left
