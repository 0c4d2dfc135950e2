"""Jobs as a user sees them: submit, look, and ask for something. What a worker writes is in `jobs.lease`."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from jobs import counters
from jobs.database import Database, now
from jobs.errors import JobNotFound, UnknownCursor, WrongState
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.states import TERMINAL, State
from jobs.tables import Attempt, CheckpointRow, Evaluation, Job, JobEvent, Outbox, Point


def create(database: Database, settings: Settings, request: JobRequest) -> Job:
    """∅ → queued. The job and its announcement in one commit; nothing is published yet."""
    spec = request.spec()
    job_id = f"job-{secrets.token_hex(10)}"
    with database.transaction() as session:
        at = clock(session)
        assert spec.optimisation.steps is not None
        job = Job(
            id=job_id,
            name=request.name,
            user_metadata=request.metadata,
            spec=spec.model_dump(mode="json"),
            method=spec.method.name,
            state=State.QUEUED,
            created_at=at,
            queued_at=at,
            max_attempts=settings.max_attempts,
            steps=spec.optimisation.steps,
            figures={},
            run_directory=str(settings.runs / job_id),
        )
        session.add(job)
        session.flush()
        session.add(Outbox(job_id=job_id, due_at=at))
        add_event(session, job_id, "queued", None, {})
    return job


def get(database: Database, job_id: str) -> Job:
    """Raises JobNotFound."""
    with database.reading() as session:
        return _get(session, job_id)


def _get(session: Session, job_id: str) -> Job:
    job = session.get(Job, job_id)
    if job is None:
        raise JobNotFound(job_id)
    return job


T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    items: Sequence[T]
    has_more: bool


def list_jobs(
    database: Database, state: State | None = None, method: str | None = None, after: str | None = None, limit: int = 20
) -> Page[Job]:
    """Newest first. `after` is the id of the last job of the page before; raises UnknownCursor for an unknown one."""
    query = select(Job).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)
    if state is not None:
        query = query.where(Job.state == state)
    if method is not None:
        query = query.where(Job.method == method)
    with database.reading() as session:
        if after is not None:
            last = session.get(Job, after)
            if last is None:
                raise UnknownCursor(after)
            query = query.where(tuple_(Job.created_at, Job.id) < (last.created_at, last.id))
        jobs = session.scalars(query).all()
    return Page(jobs[:limit], len(jobs) > limit)


def attempts(database: Database, job_id: str) -> Sequence[Attempt]:
    with database.reading() as session:
        return session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.fence)).all()


def events(database: Database, job_id: str, after: int = 0, limit: int = 100) -> Page[JobEvent]:
    """Oldest first, behind the event with the id `after`."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after).order_by(JobEvent.id)
    with database.reading() as session:
        _get(session, job_id)
        found = session.scalars(query.limit(limit + 1)).all()
    return Page(found[:limit], len(found) > limit)


def points(
    database: Database, job_id: str, after: int = 0, limit: int = 1000, thin_to: int | None = None
) -> Page[Point]:
    """Steps behind step `after`, in order. With `thin_to`, about so many of them, evenly spaced, the last included."""
    query = select(Point).where(Point.job_id == job_id, Point.step > after).order_by(Point.step)
    with database.reading() as session:
        _get(session, job_id)
        if thin_to is not None:
            counted = select(func.count(), func.max(Point.step)).where(Point.job_id == job_id, Point.step > after)
            count, last = session.execute(counted).one()
            stride = max(1, -(-count // thin_to))
            query = query.where((Point.step % stride == 0) | (Point.step == last))
            limit = count + 1
        found = session.scalars(query.limit(limit + 1)).all()
    return Page(found[:limit], len(found) > limit)


def evaluations(database: Database, job_id: str) -> Sequence[Evaluation]:
    with database.reading() as session:
        return session.scalars(select(Evaluation).where(Evaluation.job_id == job_id).order_by(Evaluation.step)).all()


def checkpoints(database: Database, job_id: str) -> Sequence[CheckpointRow]:
    """Newest first."""
    query = select(CheckpointRow).where(CheckpointRow.job_id == job_id).order_by(CheckpointRow.step.desc())
    with database.reading() as session:
        _get(session, job_id)
        return session.scalars(query).all()


def request_cancel(database: Database, job_id: str) -> Job:
    """queued, paused → cancelled; running: noted, and obeyed at the next step boundary.

    Asked twice, or of a job that is cancelled already, it changes nothing. Raises WrongState where the job has ended
    otherwise.
    """
    with database.transaction() as session:
        job = _locked(session, job_id)
        if job.state in (State.QUEUED, State.PAUSED):
            job.cancel_requested_at = job.finished_at = clock(session)
            job.state = State.CANCELLED
            add_event(session, job_id, "cancelled", None, {})
            counters.add(database, session, "jobs_finished", State.CANCELLED, 1)
        elif job.state == State.RUNNING and job.cancel_requested_at is None:
            job.cancel_requested_at = clock(session)
            add_event(session, job_id, "cancel_requested", None, {})
        elif job.state in TERMINAL and job.state != State.CANCELLED:
            raise WrongState(job_id, job.state, "cancelled", "queued, running or paused")
    return job


def request_pause(database: Database, job_id: str) -> Job:
    """queued → paused; running: noted, and obeyed at the next step boundary. Asked twice, it changes nothing."""
    with database.transaction() as session:
        job = _locked(session, job_id)
        if job.state in TERMINAL:
            raise WrongState(job_id, job.state, "paused", "queued or running")
        if job.state == State.QUEUED:
            job.state = State.PAUSED
            add_event(session, job_id, "paused", None, {})
        elif job.state == State.RUNNING and job.pause_requested_at is None:
            job.pause_requested_at = clock(session)
            add_event(session, job_id, "pause_requested", None, {})
    return job


def resume(database: Database, job_id: str) -> Job:
    """paused → queued. Of a job that is queued or running already, it changes nothing but a wish to pause."""
    with database.transaction() as session:
        job = _locked(session, job_id)
        if job.state in TERMINAL:
            raise WrongState(job_id, job.state, "resumed", "paused")
        job.pause_requested_at = None
        if job.state == State.PAUSED:
            job.state, job.queued_at, job.not_before = State.QUEUED, clock(session), 0.0
            announce_later(session, job_id, 0.0)
            add_event(session, job_id, "queued", None, {})
    return job


def _locked(session: Session, job_id: str) -> Job:
    """The job, held until the transaction ends: between a look and a change nobody else may change it."""
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise JobNotFound(job_id)
    return job


# ------------------------------------------------------------------------------------- for the modules beside this one


def add_event(session: Session, job_id: str, kind: str, step: int | None, data: dict[str, Any]) -> None:
    session.add(JobEvent(job_id=job_id, at=clock(session), type=kind, step=step, data=data))


def announce_later(session: Session, job_id: str, delay: float) -> None:
    """Into the outbox, due in `delay` seconds."""
    session.add(Outbox(job_id=job_id, due_at=clock(session) + delay))


def clock(session: Session) -> float:
    """The database's own time, Unix seconds."""
    return session.execute(select(now())).scalar_one()
