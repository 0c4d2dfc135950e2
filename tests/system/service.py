"""A running stack as a test sees it: through HTTP, and by its processes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from cli.stack import Stack
from tests.conftest import job_body

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
        answer = self.http.post("/v1/jobs", json=job_body(**changes))
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

    def wait_until(self, job_id: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while not holds(job := self.job(job_id)):
            ended = job["state"] in ("succeeded", "failed", "cancelled")
            assert not ended, f"ended as {job['state']}: {job['error']}"
            assert time.monotonic() < deadline, f"still {job['state']} at step {job['progress']['step']}"
            time.sleep(0.1)
        return job

    def trainers(self, job_id: str) -> list[psutil.Process]:
        """Every live process that trains this job: torchrun and its ranks."""
        found = []
        for process in psutil.process_iter():
            try:
                if any(job_id in part for part in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found
