"""The broker dies, or forgets everything, while a job runs: the run does not need it."""

from collections.abc import Iterator

import psutil
import pytest

from tests.system.service import Service, running

JOB = {"optimisation": {"steps": 300, "evaluate_every": 300}, "checkpoints": {"every": 60}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("broker")) as started:
        yield started


@pytest.mark.parametrize("memory", ["kept", "emptied"])
def test_a_run_goes_on_without_a_broker_and_the_next_job_comes_after_it(
    service: Service, undisturbed: list[tuple[int, float]], memory: str
) -> None:
    running_job, waiting_job = service.submit(**JOB), service.submit(**JOB)
    service.wait_for_step(running_job, 30)
    worker = psutil.Process(service.stack.pid("worker-1"))
    service.stack.kill("broker")
    service.wait_for_step(running_job, 90)
    if memory == "emptied":
        for file in (service.stack.home / "broker").glob("appendonlydir/*"):
            file.unlink()
    service.stack.restart("broker")
    for job_id in (running_job, waiting_job):
        service.wait(job_id, "succeeded")
        assert service.outcomes(job_id) == ["succeeded"]
        assert service.curve(job_id) == undisturbed
    assert worker.is_running()


def test_a_run_ends_without_a_broker_and_can_be_paused_without_one(
    service: Service, undisturbed: list[tuple[int, float]]
) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 30)
    service.stack.kill("broker")
    service.http.post(f"/v1/jobs/{job_id}/pause")
    service.wait(job_id, "paused")
    service.http.post(f"/v1/jobs/{job_id}/resume")
    service.stack.restart("broker")
    service.wait_for_step(job_id, 100)
    service.stack.kill("broker")
    service.wait(job_id, "succeeded")
    service.stack.restart("broker")
    assert service.curve(job_id) == undisturbed
