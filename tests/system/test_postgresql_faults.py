"""The database server dies while a job runs; training goes on, and what it reported is stored when the server is back.

The tests that fake an outage are in tests/worker; here the server is a real one.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.system.postgresql import Postgresql
from tests.system.service import Service, running
from tests.system.watch import Watch

JOB = {"optimisation": {"steps": 300, "evaluate_every": 300}, "checkpoints": {"every": 60}}


@pytest.fixture(scope="module")
def server() -> Iterator[Postgresql]:
    with Postgresql() as started:
        yield started


@pytest.fixture(scope="module")
def service(server: Postgresql, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With a lease that is longer than the shorter outages."""
    home = tmp_path_factory.mktemp("postgresql")
    with running(home, STIEFEL_DATABASE_URL=server.url, STIEFEL_LEASE_SECONDS="20") as started:
        yield started


def test_a_server_that_is_killed_and_started_again_ends_no_run(
    service: Service, server: Postgresql, undisturbed: list[tuple[int, float]]
) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 30)
    server.kill()
    reached = service.reported(job_id)
    service.until(lambda: service.reported(job_id) > reached + 60, "steps that the database cannot hear of")
    server.start()
    service.wait(job_id, "succeeded")
    assert service.outcomes(job_id) == ["succeeded"]
    assert service.curve(job_id) == undisturbed


def _has_reported(service: Service, job_id: str, step: int) -> bool:
    return service.reported(job_id) >= step


def test_connections_that_are_cut_again_and_again_lose_nothing(
    service: Service, server: Postgresql, undisturbed: list[tuple[int, float]]
) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 10)
    cut = 0
    for _ in range(20):
        before = service.reported(job_id)
        cut += server.cut_connections()
        goal = min(300, before + 10)
        service.until(partial(_has_reported, service, job_id, goal), "steps")
    assert cut > 20
    service.wait(job_id, "succeeded")
    assert service.outcomes(job_id) == ["succeeded"]
    assert service.curve(job_id) == undisturbed


def test_a_job_that_ends_while_the_server_is_away_has_ended_when_it_is_back(
    service: Service, server: Postgresql, undisturbed: list[tuple[int, float]]
) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 200)
    server.kill()
    service.until(lambda: service.trainers(job_id) == [], "the end of training")
    server.start()
    service.wait(job_id, "succeeded")
    assert service.outcomes(job_id) == ["succeeded"]
    assert service.curve(job_id) == undisturbed


def test_a_server_that_is_away_for_longer_than_the_lease_costs_an_attempt_and_no_step(
    undisturbed: list[tuple[int, float]], tmp_path: Path
) -> None:
    """In an installation of its own, with a short lease."""
    with (
        Postgresql() as server,
        running(tmp_path, STIEFEL_DATABASE_URL=server.url) as service,
        Watch(tmp_path / "runs") as watch,
    ):
        job_id = service.submit(**JOB)
        service.wait_for_step(job_id, 30)
        server.kill()
        service.until(lambda: not service.is_locked(job_id), "the worker to give up")
        assert service.trainers(job_id) == []
        assert service.reported(job_id) < 300
        server.start()
        service.wait(job_id, "succeeded")
        assert service.outcomes(job_id) == ["lost", "succeeded"]
        assert service.curve(job_id) == undisturbed
    assert watch.overlaps == []
