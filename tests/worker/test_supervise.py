"""One supervisor and its real trainer, while the database misbehaves."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from jobs import lease as leases
from jobs import reports, store, submission
from jobs.database import Database
from jobs.locks import Locks, device_locks, run_lock
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.states import State
from jobs.workers import Card
from migrations.__main__ import upgrade
from tests.conftest import job_body
from trainer import events
from trainer.checkpoint.place import Directory
from trainer.rundir import RunDir
from worker.outcome import outcome_of
from worker.supervise import run_next

CARD = Card("w", "host", "0", (), 2)


@pytest.fixture
def quick(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, lease_seconds=4, beat_seconds=0.2, poll_seconds=0.1, grace_seconds=20)


def submit(settings: Settings, **changes: Any) -> tuple[Database, str]:
    upgrade(settings.url)
    database = Database(settings.url)
    return database, submission.create(database, settings, JobRequest.model_validate(job_body(**changes))).id


class Outage:
    """Lets functions of jobs.lease and jobs.reports fail as if the database were away, until `over` holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str, over: Callable[[], bool] = lambda: False) -> None:
        self.over, self.failed = over, 0
        for name in names:
            where = leases if hasattr(leases, name) else reports
            monkeypatch.setattr(where, name, self._breaking(getattr(where, name)))

    def _breaking(self, real: Any) -> Any:
        def broken(*arguments: Any) -> Any:
            if not self.over():
                self.failed += 1
                raise OperationalError("SELECT", {}, ConnectionError("away"))
            return real(*arguments)

        return broken


def test_events_of_an_outage_are_stored_when_it_is_over(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    database, job_id = submit(quick)
    reported = RunDir(store.get(database, job_id).run_directory).events
    # Until the trainer has written its last line.
    outage = Outage(monkeypatch, "record", over=lambda: reported.exists() and '"finished"' in reported.read_text())
    run_next(database, quick, CARD, job_id, lambda: False)
    assert outage.failed > 3
    assert store.get(database, job_id).state == State.SUCCEEDED
    assert [p.step for p in store.points(database, job_id).items] == list(range(1, 21))
    database.close()


def test_a_lease_that_cannot_be_renewed_ends_the_trainer_with_a_checkpoint_and_writes_nothing(
    quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = quick.model_copy(update={"lease_seconds": 30})
    database, job_id = submit(patient, optimisation={"steps": 100_000})
    Outage(monkeypatch, "beat", "record")
    began = time.monotonic()
    run_next(database, patient, CARD, job_id, lambda: False)
    assert time.monotonic() - began < patient.lease_seconds + 5
    assert store.points(database, job_id).items == []
    rundir = RunDir(store.get(database, job_id).run_directory)
    assert len(Directory(rundir.checkpoints).complete_steps()) == 1
    # For the reaper to find.
    assert store.get(database, job_id).state == State.RUNNING
    database.close()


def test_a_trainer_that_does_not_stop_in_time_is_killed(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that hangs: here a process that ignores every request."""
    database, job_id = submit(quick)
    impatient = quick.model_copy(update={"grace_seconds": 1.0})
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    real = subprocess.Popen
    monkeypatch.setattr(
        "worker.launch.subprocess.Popen", lambda command, **options: real([sys.executable, "-c", script], **options)
    )
    store_cancel_later = iter([False, False])
    run_next(database, impatient, CARD, job_id, lambda: next(store_cancel_later, True))
    job = store.get(database, job_id)
    assert job.state == State.QUEUED
    assert job.failures == 0  # it was asked to, so it costs no attempt
    assert [a.outcome for a in store.attempts(database, job_id)] == ["stopped"]
    assert job.error is not None
    assert job.error["code"] == "killed"
    database.close()


def test_gpus_and_run_directory_stay_locked_while_a_trainer_lives(quick: Settings, tmp_path: Path) -> None:
    def locks(gpus: str, run: str) -> Locks:
        devices = device_locks(quick, Card("w", "host", "0", tuple(gpus.split(",")), 1))
        return Locks([*devices.paths, *run_lock(str(tmp_path / run)).paths])

    mine, overlapping, same_run = locks("0,1", "a"), locks("1,2", "b"), locks("4", "a")
    assert mine.try_acquire()
    assert not overlapping.try_acquire()
    assert not same_run.try_acquire()
    elsewhere = locks("2,3", "c")
    assert elsewhere.try_acquire()
    elsewhere.release()
    with subprocess.Popen(["sleep", "600"], pass_fds=tuple(mine.descriptors)) as trainer:
        mine.release()  # as if the worker had died
        assert not overlapping.try_acquire()
        assert not same_run.try_acquire()
        trainer.kill()
    for other in (overlapping, same_run):
        assert other.try_acquire()
        other.release()


def test_a_supervisor_that_cannot_work_says_so_and_the_job_is_tried_again(
    quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, job_id = submit(quick)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("worker.supervise.start", full)
    run_next(database, quick, CARD, job_id, lambda: False)
    job = store.get(database, job_id)
    assert job.state == State.QUEUED
    assert job.error is not None
    assert job.error["code"] == "infrastructure"
    assert "No space left" in job.error["message"]
    database.close()


def test_what_this_attempt_reported_decides(quick: Settings, tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    first = events.Failed(step=3, reason="bad_data", message="first", retryable=False, rank=1)
    then = events.Failed(step=0, reason="unknown", message="lost its peer", retryable=True, rank=0)
    outcome = outcome_of(rundir, 1, [first, events.Preparing(step=0, what="x"), then], killed=False)
    assert (outcome.kind, outcome.error and outcome.error["message"]) == ("failed", "first")
    done = events.Finished(step=9, seconds=1.0)
    assert outcome_of(rundir, -6, [done], killed=False).kind == "succeeded"
    silent = outcome_of(rundir, 64, [], killed=False)
    assert silent.error is not None
    assert silent.error["code"] == "bad_configuration"


def test_two_announcements_of_one_job_train_it_once(quick: Settings) -> None:
    database, job_id = submit(quick, optimisation={"steps": 3})
    run_next(database, quick, CARD, job_id, lambda: False)
    run_next(database, quick, CARD, job_id, lambda: False)
    assert [a.outcome for a in store.attempts(database, job_id)] == ["succeeded"]
    database.close()


def test_a_claim_that_fails_leaves_no_lock_behind(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody, this worker included, could ever start the job."""
    database, job_id = submit(quick, optimisation={"steps": 3})
    with monkeypatch.context() as patched, pytest.raises(OperationalError):
        Outage(patched, "claim")
        run_next(database, quick, CARD, job_id, lambda: False)
    lock = run_lock(store.get(database, job_id).run_directory)
    assert lock.try_acquire()
    lock.release()
    run_next(database, quick, CARD, job_id, lambda: False)
    assert store.get(database, job_id).state == State.SUCCEEDED
    database.close()


def test_a_stop_file_that_cannot_be_written_becomes_a_signal(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    database, job_id = submit(quick, optimisation={"steps": 100_000})
    rundir = RunDir(store.get(database, job_id).run_directory)
    real = Path.touch

    def touch(path: Path, *arguments: Any, **options: Any) -> None:
        if path == rundir.stop:
            raise OSError(28, "No space left on device")
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "touch", touch)
    run_next(
        database, quick, CARD, job_id, lambda: rundir.events.exists() and '"type":"step"' in rundir.events.read_text()
    )
    assert [a.outcome for a in store.attempts(database, job_id)] == ["stopped"]
    assert store.get(database, job_id).failures == 0
    assert Directory(rundir.checkpoints).complete_steps() != []
    database.close()
