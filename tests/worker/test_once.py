"""python -m worker --once, as a process of its own: one job, or none, and then the end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import store, submission, workers
from jobs.database import Database
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.states import State
from migrations.__main__ import upgrade
from tests.conftest import job_body
from worker.alive import problem

LONG = {"optimisation": {"steps": 20_000, "evaluate_every": 20_000}, "checkpoints": {"every": 20_000}}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(home=tmp_path / "home", worker="once", alive_file=tmp_path / "alive", beat_seconds=0.5, auth="off")
    upgrade(made.url)
    return made


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    made = Database(settings.url)
    yield made
    made.close()


def submit(database: Database, settings: Settings, **changes: object) -> str:
    return submission.create(database, settings, JobRequest.model_validate(job_body(**changes)), "", None).id


def start(settings: Settings) -> subprocess.Popen[bytes]:
    given = {"STIEFEL_HOME": str(settings.home), "STIEFEL_WORKER": "once", "STIEFEL_BEAT_SECONDS": "0.5"}
    given["STIEFEL_ALIVE_FILE"] = str(settings.alive_file)
    return subprocess.Popen([sys.executable, "-m", "worker", "--once"], env=os.environ | given)


def test_it_trains_one_of_two_jobs_and_ends(database: Database, settings: Settings) -> None:
    ids = [submit(database, settings) for _ in range(2)]
    assert start(settings).wait(120) == 0
    assert [store.get(database, job_id).state for job_id in ids] == [State.SUCCEEDED, State.QUEUED]
    [seen] = workers.list_workers(database, settings)
    assert (seen.worker.name, seen.up) == ("once", False)
    assert seen.worker.storage_size_bytes > seen.worker.storage_free_bytes > 0


def test_it_ends_at_once_where_nothing_waits(database: Database, settings: Settings) -> None:
    assert start(settings).wait(30) == 0


def test_told_to_end_it_checkpoints_and_the_job_waits_for_another(database: Database, settings: Settings) -> None:
    job_id = submit(database, settings, **LONG)
    process = start(settings)
    try:
        deadline = time.monotonic() + 90
        while store.get(database, job_id).step < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert problem(settings.alive_file, 30) is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    job = store.get(database, job_id)
    assert (job.state, job.failures) == (State.QUEUED, 0)
    assert store.checkpoints(database, job_id)


def test_a_probe_believes_a_fresh_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    assert "has not begun to beat" in str(problem(file, 60))
    file.touch()
    assert problem(file, 60) is None
    os.utime(file, (time.time() - 90, time.time() - 90))
    assert "the last beat was 90 s ago, more than 60 s" in str(problem(file, 60))
    assert "STIEFEL_ALIVE_FILE is not set" in str(problem(None, 60))
