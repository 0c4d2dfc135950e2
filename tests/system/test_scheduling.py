"""Priorities, drains and sizes with real workers."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import job_body
from tests.system.service import Service, running

ENDLESS = {"optimisation": {"steps": 100_000}}
SHORT = {"optimisation": {"steps": 5}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two workers of two slots each, which announcements reach once: no second ring comes to help."""
    home = tmp_path_factory.mktemp("scheduling")
    settings = {"STIEFEL_PREEMPTION": "true", "STIEFEL_REANNOUNCE_SECONDS": "600", "STIEFEL_CPU_SLOTS": "2"}
    with running(home, workers=2, **settings) as started:
        yield started


def worker_of(service: Service, job_id: str) -> str:
    return str(service.job(job_id)["attempts"][-1]["worker"])


def outcomes(service: Service, job_id: str) -> list[str | None]:
    return [attempt["outcome"] for attempt in service.job(job_id)["attempts"]]


def cancel(service: Service, *jobs: str) -> None:
    for job_id in jobs:
        service.http.post(f"/v1/jobs/{job_id}/cancel")
    for job_id in jobs:
        service.wait_until(job_id, lambda job: job["state"] == "cancelled")


def test_workers_are_listed_with_what_they_have(service: Service) -> None:
    def listed() -> list[dict[str, Any]]:
        return list(service.http.get("/v1/workers").json()["data"])

    service.until(lambda: len(listed()) == 2, "both workers to say hello")
    found = listed()
    assert [(w["name"], w["device"], w["devices"], w["drained"]) for w in found] == [
        ("worker-1", "cpu", 2, False),
        ("worker-2", "cpu", 2, False),
    ]
    assert all(w["version"] and w["host"] for w in found)


def test_a_job_that_fits_no_worker_waits_and_says_why(service: Service) -> None:
    large = service.submit(resources={"processes": 4})
    following = service.submit(**SHORT)
    service.wait(following, "succeeded")
    job = service.job(large)
    assert (job["state"], job["scheduling"]["unschedulable"]) == ("queued", True)
    assert "it needs 4 devices of one worker; the largest that is up" in job["scheduling"]["reason"]
    assert "stiefel_jobs_unschedulable 1.0" in service.http.get("/metrics").text
    cancel(service, large)


def test_a_job_of_higher_priority_makes_one_of_lower_priority_checkpoint_and_wait(service: Service) -> None:
    low = [service.submit(**ENDLESS) for _ in range(2)]
    for job_id in low:
        service.wait_for_step(job_id, 5)
    waiting = service.submit(**ENDLESS)
    high = service.submit(priority=10, **SHORT)
    service.wait(high, "succeeded")
    # The youngest of the two had made room; the slot has gone to whoever was queued longest.
    assert outcomes(service, low[0]) == [None]
    assert outcomes(service, low[1])[0] == "stopped"
    assert service.job(low[1])["retry"]["failures"] == 0
    service.wait(waiting, "running")
    cancel(service, waiting)
    service.wait_until(low[1], lambda job: len(job["attempts"]) == 2 and job["progress"]["step"] > 5)
    cancel(service, *low)


def test_a_drained_worker_finishes_its_job_and_takes_no_other(service: Service) -> None:
    first = service.submit(**ENDLESS)
    service.wait_for_step(first, 1)
    name = worker_of(service, first)
    assert service.http.post(f"/v1/workers/{name}/drain").json()["drained"]
    cancel(service, first)
    others = [service.submit(**SHORT) for _ in range(3)]
    for job_id in others:
        service.wait(job_id, "succeeded")
        assert worker_of(service, job_id) != name
    # Every other worker is busy: still not this one.
    busy = service.submit(**ENDLESS)
    service.wait_for_step(busy, 1)
    waits = service.submit(**SHORT)
    assert service.job(waits)["state"] == "queued"
    service.http.post(f"/v1/workers/{name}/undrain")
    service.wait(waits, "succeeded")
    assert worker_of(service, waits) == name
    cancel(service, busy)


def test_draining_can_move_the_job_to_another_worker(service: Service) -> None:
    job_id = service.submit(optimisation={"steps": 400})
    service.wait_for_step(job_id, 5)
    name = worker_of(service, job_id)
    service.http.post(f"/v1/workers/{name}/drain?stop_job=true")
    service.wait(job_id, "succeeded")
    assert outcomes(service, job_id) == ["stopped", "succeeded"]
    assert worker_of(service, job_id) != name
    service.http.post(f"/v1/workers/{name}/undrain")


def test_a_run_that_diverges_goes_back_by_itself_and_says_so(service: Service) -> None:
    # Its loss is beyond all bounds after a few steps; with a thousandth of the rate training is quick.
    body = job_body(
        optimisation={"steps": 12, "learning_rate": 10.0, "warmup_steps": 0},
        guard={"on_divergence": "roll_back", "rate_factor": 0.001},
    )
    job_id = service.http.post("/v1/jobs", json=body | {"method": "full"}).json()["id"]
    job = service.wait(job_id, "succeeded")
    assert (job["figures"]["rollbacks"], job["figures"]["rate_scale"]) == (1, 0.001)
    kinds = [event["type"] for event in service.http.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["data"]]
    assert "rolled_back" in kinds
    assert outcomes(service, job_id) == ["succeeded"]  # one attempt: nothing has failed
    assert [step for step, _ in service.curve(job_id)] == list(range(1, 13))
