"""Everything dies at once, in the middle of a job and with others waiting; started again, all is finished."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.system.postgresql import Postgresql
from tests.system.processes import kill, tree
from tests.system.service import Service, running
from tests.system.watch import Watch

ONE_RANK = {"optimisation": {"steps": 120, "evaluate_every": 120}, "checkpoints": {"every": 30}}
TWO_RANKS = ONE_RANK | {"resources": {"processes": 2}, "method": {"rank": 8}}
JOBS: list[dict[str, Any]] = [TWO_RANKS, ONE_RANK]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[int, float]]]:
    with running(tmp_path_factory.mktemp("quiet"), workers=2) as service:
        ids = [service.submit(**job) for job in JOBS]
        for job_id in ids:
            service.wait(job_id, "succeeded")
        return [service.curve(job_id) for job_id in ids]


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> Iterator[Postgresql | None]:
    with ExitStack() as stack:
        yield stack.enter_context(Postgresql()) if request.param == "postgresql" else None


def test_after_a_power_cut_every_job_ends_as_if_nothing_had_been(
    tmp_path: Path, server: Postgresql | None, undisturbed: list[list[tuple[int, float]]]
) -> None:
    environment = {"STIEFEL_DATABASE_URL": server.url} if server else {}
    with Watch(tmp_path / "runs") as watch:
        with running(tmp_path, **environment) as before:
            ids = [before.submit(**job) for job in JOBS]
            before.wait_for_step(ids[0], 45)
            paused = before.submit(**ONE_RANK)
            assert before.http.post(f"/v1/jobs/{paused}/pause").json()["state"] == "paused"
            cut_power(before, server)
            assert all(before.trainers(job_id) == [] for job_id in ids)
        if server:
            server.start()
        with running(tmp_path, **environment) as after:
            for job_id, curve in zip(ids, undisturbed, strict=True):
                after.wait(job_id, "succeeded")
                assert after.curve(job_id) == curve
            # Nobody has resumed it.
            assert after.job(paused)["state"] == "paused"
            assert after.outcomes(ids[0]) == ["lost", "succeeded"]
    assert watch.overlaps == []


def cut_power(service: Service, server: Postgresql | None) -> None:
    processes = [process for name in service.stack.children for process in tree(service.stack.pid(name))]
    kill(processes + (server.processes if server else []))
