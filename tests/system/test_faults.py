"""Parts of the service die; no job is lost, and none is trained twice."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.system.service import Service, running
from tests.system.watch import Watch
from trainer.checkpoint.place import Directory
from trainer.rundir import RunDir

JOB = {"optimisation": {"steps": 150, "evaluate_every": 150}, "checkpoints": {"every": 30}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("faults")) as started:
        yield started


def test_a_killed_worker_s_job_goes_on_from_its_checkpoint(
    service: Service, undisturbed: list[tuple[int, float]]
) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 45)
    main = psutil.Process(service.stack.pid("worker-1"))
    for process in [*main.children(recursive=True), main]:
        # The worker and the child that supervises, not the trainer: it has to notice by itself.
        if process not in service.trainers(job_id):
            process.kill()
    service.stack.restart("worker-1")
    job = service.wait(job_id, "succeeded")
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["lost", "succeeded"]
    assert service.curve(job_id) == undisturbed


def test_a_killed_trainer_is_started_again(service: Service, undisturbed: list[tuple[int, float]]) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 45)
    for process in service.trainers(job_id):
        process.kill()
    job = service.wait(job_id, "succeeded")
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["failed", "succeeded"]
    assert job["attempts"][0]["error"]["code"] == "killed"
    assert "SIGKILL" in job["attempts"][0]["error"]["message"]
    assert service.curve(job_id) == undisturbed


def test_a_worker_that_is_told_to_end_checkpoints_and_spends_no_attempt(
    service: Service, undisturbed: list[tuple[int, float]]
) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 45)
    worker = psutil.Process(service.stack.pid("worker-1"))
    worker.terminate()
    worker.wait(60)
    job = service.job(job_id)
    assert job["state"] == "queued"
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["stopped"]
    assert service.trainers(job_id) == []
    service.stack.restart("worker-1")
    service.wait(job_id, "succeeded")
    assert service.curve(job_id) == undisturbed


def test_the_api_may_die_while_a_job_runs(service: Service, undisturbed: list[tuple[int, float]]) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 30)
    service.stack.kill("api")
    service.stack.restart("api")
    service.stack._wait_for("api", lambda: service.http.get("/healthz").status_code == 200)
    job = service.wait(job_id, "succeeded")
    assert len(job["attempts"]) == 1
    assert service.curve(job_id) == undisturbed


def test_a_job_posted_while_the_broker_is_dead_runs_when_it_is_back(service: Service) -> None:
    service.stack.kill("broker")
    job_id = service.submit(optimisation={"steps": 5})
    assert service.job(job_id)["state"] == "queued"
    assert service.http.get("/readyz").json()["broker"].startswith("away")
    service.stack.restart("broker")
    service.wait(job_id, "succeeded")


def test_a_broker_that_forgot_everything_loses_no_job(service: Service) -> None:
    service.stack.kill("worker-1")
    job_id = service.submit(optimisation={"steps": 5})
    service.stack.kill("broker")
    for file in (service.stack.home / "broker").glob("appendonlydir/*"):
        file.unlink()
    service.stack.restart("broker")
    service.stack.restart("worker-1")
    service.wait(job_id, "succeeded")


def test_cancel_takes_effect_within_a_step_and_leaves_a_checkpoint(service: Service) -> None:
    job_id = service.submit(optimisation={"steps": 5000, "evaluate_every": 250}, checkpoints={"every": 40})
    service.wait_for_step(job_id, 10)
    assert service.http.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "running"
    job = service.wait_until(job_id, lambda seen: seen["state"] == "cancelled")
    rundir = RunDir(job["run_directory"])
    newest = rundir.checkpoint(Directory(rundir.checkpoints).complete_steps()[-1])
    assert newest.name == f"step-{job['progress']['step']:08d}"
    assert service.trainers(job_id) == []
    assert service.http.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"


def test_pause_and_resume_give_the_undisturbed_curve(service: Service, undisturbed: list[tuple[int, float]]) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 45)
    service.http.post(f"/v1/jobs/{job_id}/pause")
    service.wait(job_id, "paused")
    service.http.post(f"/v1/jobs/{job_id}/resume")
    service.wait(job_id, "succeeded")
    assert service.curve(job_id) == undisturbed


def test_of_two_workers_the_idle_one_takes_the_next_job_at_once(tmp_path: Path) -> None:
    with running(tmp_path, workers=2, STIEFEL_REANNOUNCE_SECONDS="600") as service:
        jobs = [service.submit(optimisation={"steps": 5000}) for _ in range(2)]
        for job_id in jobs:
            service.wait_for_step(job_id, 1)
        workers = {service.job(job_id)["attempts"][0]["worker"] for job_id in jobs}
        assert workers == {"worker-1", "worker-2"}


def test_a_job_is_never_trained_twice_at_once(tmp_path: Path, undisturbed: list[tuple[int, float]]) -> None:
    """Its worker dies, its trainer is slow to end, and another worker waits: the other one must wait longer."""
    with running(tmp_path, workers=2) as service, Watch(service.stack.home / "runs") as watch:
        job_id = service.submit(**JOB)
        service.wait_for_step(job_id, 45)
        (trainer,) = service.trainers(job_id)
        # It hangs, as in a step that takes minutes, while its worker dies and its lease runs out.
        trainer.suspend()
        name = service.job(job_id)["attempts"][0]["worker"]
        main = psutil.Process(service.stack.pid(name))
        for process in [*main.children(recursive=True), main]:
            if process != trainer:
                process.kill()
        service.wait(job_id, "queued")
        time.sleep(4)
        assert len(service.job(job_id)["attempts"]) == 1
        trainer.resume()
        job = service.wait(job_id, "succeeded")
        assert [attempt["outcome"] for attempt in job["attempts"]] == ["lost", "succeeded"]
        assert service.curve(job_id) == undisturbed
    assert watch.busy > 20
    assert watch.most[job_id] == 1
    assert watch.overlaps == []
