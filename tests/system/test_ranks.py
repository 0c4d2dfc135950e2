"""A trainer of two ranks is five processes with the worker's child; each of them may die."""

from collections.abc import Iterator

import psutil
import pytest

from tests.system.processes import alive, kill, resume, suspend
from tests.system.service import Service, running
from tests.system.watch import Watch

JOB = {
    "resources": {"processes": 2},
    "deepspeed": {"zero_stage": 2},
    "optimisation": {"steps": 100, "evaluate_every": 100},
    "checkpoints": {"every": 20},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("ranks"), workers=2) as started:
        yield started


ROLES = ["rank-0", pytest.param("rank-1", marks=pytest.mark.matrix), "torchrun", "trainer"]


@pytest.mark.parametrize("role", ROLES)
def test_a_job_of_two_ranks_goes_on_whichever_of_its_processes_is_killed(
    service: Service, undisturbed: list[tuple[int, float]], watch: Watch, role: str
) -> None:
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 25)
    others = service.trainers(job_id)
    assert sorted(one.role for one in service.roles(job_id)) == ["rank-0", "rank-1", "torchrun", "trainer"]
    kill([service.role(job_id, role)])
    psutil.wait_procs(others, timeout=60)
    assert not any(map(alive, others))
    service.wait(job_id, "succeeded")
    assert service.outcomes(job_id) == ["failed", "succeeded"]
    assert service.curve(job_id) == undisturbed


def test_ranks_without_worker_and_launcher_keep_others_off_their_gpus(
    service: Service, undisturbed: list[tuple[int, float]]
) -> None:
    """A rank hangs in a long step while all above torchrun are killed, as by an operator who tidies up."""
    job_id = service.submit(**JOB)
    service.wait_for_step(job_id, 25)
    rank, name = service.role(job_id, "rank-1"), service.worker_of(job_id)
    rank.suspend()
    try:
        with Watch(service.stack.home / "runs") as watch:
            kill([*service.worker_processes(name), service.role(job_id, "trainer")])
            service.stack.restart(name)
            service.wait(job_id, "queued")
            looks = watch.looks
            service.until(lambda: watch.looks > looks + 100 or watch.overlaps != [], "five seconds of looking")
        assert watch.overlaps == []
    finally:
        rank.resume()
    service.wait(job_id, "succeeded")
    assert service.curve(job_id) == undisturbed


def test_a_rank_that_has_hardly_started_dies_with_torchrun(service: Service) -> None:
    """Torchrun is killed while its ranks still import; they must not wait for one another beside the next attempt."""
    ranks: list[psutil.Process] = []
    with Watch(service.stack.home / "runs") as watch:
        job_id = service.submit(**JOB)
        while not ranks:
            ranks = [one.process for one in service.roles(job_id) if one.role.startswith("rank")]
        suspend(ranks)
        try:
            kill([service.role(job_id, "torchrun")])
            resume(ranks)
            service.wait_for_step(job_id, 1)
        finally:
            kill(ranks)
    assert watch.overlaps == []
    service.wait(job_id, "succeeded")
