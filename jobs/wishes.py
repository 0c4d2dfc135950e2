"""What users want of their jobs. Of a running job it is noted: its worker obeys at the next step boundary."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from jobs import counters, keys, places, results, webhooks
from jobs.database import Database, clock
from jobs.errors import FilesInUse, JobNotFound, ModelInUse, WrongState
from jobs.journal import add_event, announce_later
from jobs.locks import run_lock
from jobs.settings import Settings
from jobs.states import TERMINAL, State
from jobs.tables import Attempt, CheckpointRow, Evaluation, Job, JobEvent, JobFile, Outbox, Point
from trainer.rundir import RunDir


def cancel(database: Database, settings: Settings, job_id: str) -> Job:
    """queued, paused → cancelled; running: noted, and obeyed at the next step boundary.

    Asked twice, or of a job that is cancelled already, it changes nothing. Raises WrongState where the job has ended
    otherwise.
    """
    with database.transaction() as session:
        job = _locked(session, job_id)
        if job.state in (State.QUEUED, State.PAUSED):
            job.cancel_requested_at = job.finished_at = clock(session)
            job.state = State.CANCELLED
            add_event(session, job, "cancelled", None, {})
            counters.add(database, session, "jobs_finished", State.CANCELLED, 1)
            results.attach(session, job)
            webhooks.tell(session, settings, job)
        elif job.state == State.RUNNING and job.cancel_requested_at is None:
            job.cancel_requested_at = clock(session)
            add_event(session, job, "cancel_requested", None, {})
        elif job.state in TERMINAL and job.state != State.CANCELLED:
            raise WrongState(job_id, job.state, "cancelled", "queued, running or paused")
    return job


def pause(database: Database, job_id: str) -> Job:
    """queued → paused; running: noted, and obeyed at the next step boundary. Asked twice, it changes nothing."""
    with database.transaction() as session:
        job = _locked(session, job_id)
        if job.state in TERMINAL:
            raise WrongState(job_id, job.state, "paused", "queued or running")
        if job.state == State.QUEUED:
            job.state = State.PAUSED
            add_event(session, job, "paused", None, {})
        elif job.state == State.RUNNING and job.pause_requested_at is None:
            job.pause_requested_at = clock(session)
            add_event(session, job, "pause_requested", None, {})
    return job


def resume(database: Database, job_id: str) -> Job:
    """paused → queued. Of a job that is queued or running already, it changes nothing but a wish to pause.

    Raises QuotaExceeded where its owner has no device hours or no storage left.
    """
    with database.transaction() as session:
        job = _locked(session, job_id)
        if job.state in TERMINAL:
            raise WrongState(job_id, job.state, "resumed", "paused")
        job.pause_requested_at = None
        if job.state == State.PAUSED:
            keys.check_resources(session, job.owner)
            job.state, job.queued_at, job.not_before = State.QUEUED, clock(session), 0.0
            announce_later(session, job_id, 0.0)
            add_event(session, job, "queued", None, {})
    return job


def remove(database: Database, job_id: str) -> None:
    """A job that has ended → ∅, and its run directory, where this process sees it. What is in an object store stays.

    Called again after it was interrupted, it goes on. Raises WrongState where the job has not ended, ModelInUse where
    another that has not starts from its model, and FilesInUse, say because a trainer that outlived its worker has not
    yet noticed.
    """
    with database.reading() as session:
        job = session.get(Job, job_id)
    if job is None:
        raise JobNotFound(job_id)
    if job.state not in TERMINAL:
        raise WrongState(job_id, job.state, "deleted", "succeeded, failed or cancelled")
    # The files first: without the row nobody would find them again.
    with _alone(job):
        _take_model(database, job_id)
        _remove(Path(job.run_directory))
    with database.transaction() as session:
        places.leave(database, session, job)
        for table in (Attempt, Outbox, JobEvent, Point, Evaluation, CheckpointRow, JobFile):
            session.execute(delete(table).where(table.job_id == job_id))
        session.execute(delete(Job).where(Job.id == job_id))


def remove_model(database: Database, job: Job) -> None:
    """The checkpoints of a job that has ended, and what was made of them; its curves, events and logs stay.

    Raises WrongState and FilesInUse as `remove` does.
    """
    if job.state not in TERMINAL:
        raise WrongState(job.id, job.state, "deleted", "succeeded, failed or cancelled")
    rundir = RunDir(job.run_directory)
    with _alone(job):
        _take_model(database, job.id)
        for path in (rundir.checkpoints, rundir.exports, rundir.data):
            _remove(path)
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job.id).values(storage_bytes=0))


def _take_model(database: Database, job_id: str) -> None:
    """Nobody can name the job's model any longer. Raises ModelInUse where a job that has not ended starts from it.

    Under the job's row, which who starts from it holds too: either is first.
    """
    with database.transaction() as session:
        _locked(session, job_id)
        query = select(Job.id).where(Job.base_run == job_id, Job.state.not_in(TERMINAL)).order_by(Job.id)
        if found := session.scalars(query).all():
            raise ModelInUse(job_id, found)
        session.execute(delete(CheckpointRow).where(CheckpointRow.job_id == job_id))


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """With its run directory, where this process sees it. Raises FilesInUse."""
    lock = run_lock(job.run_directory)
    try:
        if Path(job.run_directory).exists() and not lock.try_acquire():
            raise FilesInUse(job.id, "a trainer that outlived its worker has not yet ended")
        yield
    except OSError as error:
        raise FilesInUse(job.id, str(error)) from error
    finally:
        lock.release()


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _locked(session: Session, job_id: str) -> Job:
    """The job, held until the transaction ends: between a look and a change nobody else may change it."""
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise JobNotFound(job_id)
    return job
