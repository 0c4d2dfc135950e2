"""One of a worker's two processes dies, or both stand still for longer than their lease."""

from collections.abc import Iterator

import psutil
import pytest

from tests.system.processes import alive, kill, resume, suspend
from tests.system.service import Service, running
from tests.system.watch import Watch

JOB = {"optimisation": {"steps": 150, "evaluate_every": 150}, "checkpoints": {"every": 30}}
ENDLESS = {"optimisation": {"steps": 20_000, "evaluate_every": 20_000}, "checkpoints": {"every": 20_000}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("workers"), workers=2) as started:
        yield started


def test_a_worker_whose_supervising_child_is_killed_goes_on_working(
    service: Service, undisturbed: list[tuple[int, float]], watch: Watch
) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 45)
    main, child = service.worker_processes(service.worker_of(job_id))
    kill([child])
    service.wait(job_id, "succeeded")
    assert service.outcomes(job_id) == ["lost", "succeeded"]
    assert service.curve(job_id) == undisturbed
    assert alive(main)


def test_a_job_outlives_the_main_process_of_its_worker(
    service: Service, undisturbed: list[tuple[int, float]], watch: Watch
) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 45)
    name = service.worker_of(job_id)
    main, child = service.worker_processes(name)
    kill([main])
    service.stack.restart(name)
    service.wait(job_id, "succeeded")
    assert service.curve(job_id) == undisturbed
    service.until(lambda: not alive(child), "the end of the child that nobody gives work")


def test_a_worker_without_its_main_process_still_ends_with_the_stack(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("orphan")) as service:
        job_id = service.submit(**ENDLESS)
        service.wait_for_step(job_id, 5)
        main, child = service.worker_processes("worker-1")
        trainers = service.trainers(job_id)
        kill([main])
    try:
        _, left = psutil.wait_procs([child, *trainers], timeout=20)
        assert left == []
    finally:
        kill([child, *trainers])


def test_a_worker_that_stood_still_for_too_long_writes_nothing_and_ends_its_trainer(
    service: Service, undisturbed: list[tuple[int, float]], watch: Watch
) -> None:
    """Its trainer goes on without it, to the end; what the worker finds when it wakes up is not its to tell."""
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 30)
    stopped = service.worker_processes(service.worker_of(job_id))
    suspend(stopped)
    try:
        service.wait(job_id, "queued")
        service.until(lambda: service.trainers(job_id) == [], "the end of training")
        # The stopped worker still holds the locks, so nobody else has begun.
        assert service.outcomes(job_id) == ["lost"]
    finally:
        resume(stopped)
    service.wait(job_id, "succeeded")
    assert service.outcomes(job_id) == ["lost", "succeeded"]
    assert service.curve(job_id) == undisturbed
    assert nothing_was_written_between_loss_and_claim(service, job_id)


def test_a_trainer_that_lives_on_is_killed_when_its_stopped_worker_wakes_up(
    service: Service, undisturbed: list[tuple[int, float]], watch: Watch
) -> None:
    """Both stand still, as on a machine that swaps or is migrated; and both wake up."""
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 30)
    (trainer,) = service.trainers(job_id)
    stopped = [trainer, *service.worker_processes(service.worker_of(job_id))]
    suspend(stopped)
    try:
        service.wait(job_id, "queued")
        # Another worker has heard of the job, and must not begin.
        looks = watch.looks
        service.until(lambda: watch.looks > looks + 60, "three seconds of looking")
        assert service.outcomes(job_id) == ["lost"]
    finally:
        resume(stopped[1:])
    psutil.wait_procs([trainer], timeout=20)
    assert not alive(trainer)
    service.wait(job_id, "succeeded")
    assert service.outcomes(job_id) == ["lost", "succeeded"]
    assert service.curve(job_id) == undisturbed
    assert nothing_was_written_between_loss_and_claim(service, job_id)


def nothing_was_written_between_loss_and_claim(service: Service, job_id: str) -> bool:
    kinds = [event["type"] for event in service.http.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["data"]]
    lost = len(kinds) - 1 - kinds[::-1].index("queued")
    return kinds[lost + 1] == "claimed"
