"""The disk of the run directories is full, or cannot be written: the job says so, and nothing that was good is lost."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.mounts import fill, make_read_only, small_disk
from tests.system.service import SECONDS, Service, running
from trainer.checkpoint.place import Directory
from trainer.checkpoint.reading import newest

JOB = {"optimisation": {"steps": 150, "evaluate_every": 150}, "checkpoints": {"every": 30}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("disk")
    # Attempts enough for a disk that somebody has to clear first.
    with small_disk(home / "runs", megabytes=400), running(home, STIEFEL_MAX_ATTEMPTS="1000") as started:
        yield started


def failed_attempt(service: Service, job_id: str, seconds: float = SECONDS) -> dict[str, Any]:
    job = service.wait_until(job_id, lambda seen: any(a["outcome"] == "failed" for a in seen["attempts"]), seconds)
    return dict(next(a["error"] for a in job["attempts"] if a["outcome"] == "failed"))


@pytest.mark.parametrize("leave", [1_000_000, 0])
def test_a_full_disk_fails_the_attempt_and_the_job_goes_on_when_there_is_space(
    service: Service, undisturbed: list[tuple[int, float]], paused: str, leave: int
) -> None:
    """Less than a checkpoint is left; or nothing at all, not even for the specification."""
    place = Directory(service.rundir(paused).checkpoints)
    before = newest(place)
    file = fill(service.stack.home / "runs", leave)
    try:
        service.http.post(f"/v1/jobs/{paused}/resume")
        error = failed_attempt(service, paused)
        assert "No space left on device" in error["message"]
        assert leave == 0 or str(service.rundir(paused).checkpoints) in error["message"]
        # Read with all its checksums.
        after = newest(place)
        assert before is not None
        assert after is not None
        assert after.step >= before.step
    finally:
        file.unlink()
    service.wait(paused, "succeeded")
    assert service.curve(paused) == undisturbed


def fill_up_while_it_trains(service: Service, job_id: str) -> dict[str, Any]:
    """Why the attempt failed; the disk is free again."""
    file = fill(service.stack.home / "runs", 0)
    try:
        return failed_attempt(service, job_id)
    finally:
        file.unlink()


def test_a_disk_that_fills_up_while_a_job_trains_costs_an_attempt_and_no_step(
    service: Service, undisturbed: list[tuple[int, float]]
) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 10)
    fill_up_while_it_trains(service, job_id)
    service.wait(job_id, "succeeded")
    assert service.curve(job_id) == undisturbed


def test_a_disk_that_is_so_full_that_no_event_can_be_written_is_named(service: Service) -> None:
    """The log lies elsewhere, and no checkpoint is due, so that it is the events that fail."""
    job_id = service.submit(optimisation={"steps": 2000, "evaluate_every": 2000}, checkpoints={"every": 2000})
    service.wait_for_step(job_id, 5)
    service.http.post(f"/v1/jobs/{job_id}/pause")
    at = service.wait(job_id, "paused")["progress"]["step"]
    log, elsewhere = service.rundir(job_id).log, service.stack.home / "log.txt"
    log.unlink()
    log.symlink_to(elsewhere)
    service.http.post(f"/v1/jobs/{job_id}/resume")
    service.wait_for_step(job_id, at + 1)
    try:
        error = fill_up_while_it_trains(service, job_id)
    finally:
        service.http.post(f"/v1/jobs/{job_id}/cancel")
    # As the system says it of a write, or the trainer of half a write.
    assert re.search("No space left on device|the disk is full", error["message"])
    assert error["code"] == "infrastructure"


def test_a_new_job_on_a_full_disk_says_so(service: Service, undisturbed: list[tuple[int, float]]) -> None:
    file = fill(service.stack.home / "runs", 0)
    try:
        job_id = service.submit(**JOB)
        error = failed_attempt(service, job_id)
    finally:
        file.unlink()
    assert "No space left on device" in error["message"]
    service.wait(job_id, "succeeded")
    assert service.curve(job_id) == undisturbed


def test_a_disk_that_is_read_only_for_a_while_loses_no_job(
    service: Service, undisturbed: list[tuple[int, float]], paused: str
) -> None:
    log = service.stack.home / "logs" / "worker-1.log"
    make_read_only(service.stack.home / "runs", True)
    try:
        service.http.post(f"/v1/jobs/{paused}/resume")
        service.until(lambda: "Read-only file system" in log.read_text(), "the worker to meet the disk")
    finally:
        make_read_only(service.stack.home / "runs", False)
    try:
        service.wait_until(paused, lambda job: job["state"] == "succeeded", seconds=40)
        assert service.curve(paused) == undisturbed
    finally:
        service.stack.kill("worker-1")
        service.stack.restart("worker-1")


def test_a_job_whose_disk_is_read_only_says_so(service: Service, paused: str) -> None:
    make_read_only(service.stack.home / "runs", True)
    try:
        service.http.post(f"/v1/jobs/{paused}/resume")
        error = failed_attempt(service, paused, seconds=30)
    finally:
        make_read_only(service.stack.home / "runs", False)
        service.http.post(f"/v1/jobs/{paused}/cancel")
    assert "Read-only file system" in error["message"]
    assert str(service.rundir(paused).root) in error["message"]
