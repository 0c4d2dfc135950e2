"""A running stack as a test sees it: through HTTP, and by its processes."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from cli.stack import Stack
from tests.conftest import job_body
from tests.system.processes import TrainerProcess, alive, trainer_processes
from trainer import events
from trainer.rundir import RunDir

QUICK = {
    "STIEFEL_LEASE_SECONDS": "4",
    "STIEFEL_BEAT_SECONDS": "0.5",
    "STIEFEL_POLL_SECONDS": "0.2",
    "STIEFEL_UPKEEP_SECONDS": "0.3",
    "STIEFEL_REANNOUNCE_SECONDS": "3",
    "STIEFEL_GRACE_SECONDS": "30",
    "STIEFEL_BACKOFF_SECONDS": "0.1",
}
SECONDS = 120.0


@contextmanager
def running(home: Path, workers: int = 1, **environment: str) -> Iterator["Service"]:
    stack = Stack(home, port=0, workers=workers, environment=QUICK | environment)
    try:
        with stack, httpx.Client(base_url=stack.api_url, timeout=20) as http:
            yield Service(stack, http)
    except BaseException:
        for log in sorted((home / "logs").glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        raise


class Service:
    def __init__(self, stack: Stack, http: httpx.Client) -> None:
        self.stack, self.http = stack, http

    def submit(self, **changes: Any) -> str:
        return self.submit_body(job_body(**changes))

    def submit_body(self, body: dict[str, Any]) -> str:
        answer = self.http.post("/v1/jobs", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def curve(self, job_id: str) -> list[tuple[int, float]]:
        points = self.http.get(f"/v1/jobs/{job_id}/metrics?limit=10000").json()["points"]
        return [(point["step"], point["loss"]) for point in points]

    def wait(self, job_id: str, *states: str) -> dict[str, Any]:
        return self.wait_until(job_id, lambda job: job["state"] in states)

    def wait_for_step(self, job_id: str, step: int) -> dict[str, Any]:
        return self.wait_until(job_id, lambda job: job["progress"]["step"] >= step)

    def wait_until(
        self, job_id: str, holds: Callable[[dict[str, Any]], bool], seconds: float = SECONDS
    ) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not holds(job := self.job(job_id)):
            ended = job["state"] in ("succeeded", "failed", "cancelled")
            assert not ended, f"ended as {job['state']}: {job['error']}"
            assert time.monotonic() < deadline, f"still {job['state']} at step {job['progress']['step']}"
            time.sleep(0.1)
        return job

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """For what the API cannot tell, or not while a part of the service is dead."""
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"still waiting for {what}"
            time.sleep(0.05)

    def outcomes(self, job_id: str) -> list[str | None]:
        return [attempt["outcome"] for attempt in self.job(job_id)["attempts"]]

    def rundir(self, job_id: str) -> RunDir:
        return RunDir(self.stack.home / "runs" / job_id)

    def reported(self, job_id: str) -> int:
        """The newest step in events.jsonl, whether the database knows it or not."""
        steps = [event.step for event in events.read(self.rundir(job_id).events)]
        return steps[-1] if steps else 0

    def is_locked(self, job_id: str) -> bool:
        """Whether a worker or its trainer has the run directory."""
        with (self.rundir(job_id).root / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def trainers(self, job_id: str) -> list[psutil.Process]:
        """Every live process that trains this job: the launcher of ranks, torchrun, and the ranks."""
        return [one.process for one in self.roles(job_id)]

    def roles(self, job_id: str) -> list[TrainerProcess]:
        """`trainers`, each with what it does."""
        return [one for one in trainer_processes(self.stack.home / "runs") if one.job_id == job_id]

    def role(self, job_id: str, name: str) -> psutil.Process:
        found = [one.process for one in self.roles(job_id) if one.role == name]
        # A child that was forked a moment ago looks like its parent until it becomes its own program.
        (oldest,) = [one for one in found if one.ppid() not in {other.pid for other in found}]
        return oldest

    def worker_of(self, job_id: str) -> str:
        return str(self.job(job_id)["attempts"][-1]["worker"])

    def worker_processes(self, name: str) -> tuple[psutil.Process, psutil.Process]:
        """A worker's main process, which talks to the broker, and its child, which supervises the trainer."""
        main = psutil.Process(self.stack.pid(name))
        (child,) = [child for child in main.children() if alive(child)]
        return main, child
