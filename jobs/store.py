"""Jobs as a user sees them. They are made in `jobs.submission`, changed in `jobs.wishes` and `jobs.lease`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import ColumnElement, func, select, tuple_
from sqlalchemy.orm import Session

from jobs import places
from jobs.database import Database
from jobs.errors import JobNotFound
from jobs.states import State
from jobs.tables import Attempt, CheckpointRow, Evaluation, Job, JobEvent, Point


def get(database: Database, job_id: str, of: str | None = None) -> Job:
    """`of`: whose jobs the caller sees, None for everybody's; somebody else's is as if it were not there.

    Raises JobNotFound.
    """
    with database.reading() as session:
        return _get(session, job_id, of)


def find(database: Database, job_id: str, of: str | None = None) -> Job | None:
    """The same, or None."""
    try:
        return get(database, job_id, of)
    except JobNotFound:
        return None


def _get(session: Session, job_id: str, of: str | None = None) -> Job:
    job = session.get(Job, job_id)
    if job is None or of not in (None, job.owner):
        raise JobNotFound(job_id)
    return job


T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    items: Sequence[T]
    has_more: bool


def list_jobs(
    database: Database,
    of: str | None = None,
    state: State | None = None,
    method: str | None = None,
    after: str | None = None,
    limit: int = 20,
    where: Sequence[ColumnElement[bool]] = (),
) -> Page[Job]:
    """Newest first, those that `where` holds for. `after` is the id of the last job of the page before.

    Raises UnknownCursor for an unknown one.
    """
    query = select(Job).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)
    if of is not None:
        query = query.where(Job.owner == of)
    if state is not None:
        query = query.where(Job.state == state)
    if method is not None:
        query = query.where(Job.method == method)
    query = query.where(*where)
    with database.reading() as session:
        if after is not None:
            place = places.behind(session, Job, after, of, "job")
            query = query.where(tuple_(Job.created_at, Job.id) < place)
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


def points_at(database: Database, job_id: str, steps: Sequence[int]) -> dict[int, Point]:
    with database.reading() as session:
        found = session.scalars(select(Point).where(Point.job_id == job_id, Point.step.in_(steps)))
        return {point.step: point for point in found}


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
