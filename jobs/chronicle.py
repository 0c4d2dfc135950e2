"""What happened to a job, its steps among it, newest first: as OpenAI lists events."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import InstrumentedAttribute

from jobs.database import Database
from jobs.errors import UnknownCursor
from jobs.store import Page
from jobs.tables import JobEvent, Point


def newest(
    database: Database, job_id: str, after: tuple[type[JobEvent] | type[Point], int] | None, limit: int
) -> Page[JobEvent | Point]:
    """`after` is the last one of the page before, by its kind and number (an event's id, a point's step).

    At the same time an event comes before a step. Raises UnknownCursor, also for a step that has been undone meanwhile.
    """
    events = select(JobEvent).where(JobEvent.job_id == job_id)
    points = select(Point).where(Point.job_id == job_id)
    with database.reading() as session:
        if after is not None:
            kind, number = after
            column = JobEvent.id if kind is JobEvent else Point.step
            at = session.scalar(select(kind.at).where(kind.job_id == job_id, column == number))
            if at is None:
                raise UnknownCursor(str(number), "event")
            if kind is JobEvent:
                events, points = (
                    events.where(_before(JobEvent.at, JobEvent.id, at, number)),
                    points.where(Point.at <= at),
                )
            else:
                events, points = events.where(JobEvent.at < at), points.where(_before(Point.at, Point.step, at, number))
        found: Sequence[JobEvent | Point] = [
            *session.scalars(events.order_by(JobEvent.at.desc(), JobEvent.id.desc()).limit(limit + 1)),
            *session.scalars(points.order_by(Point.at.desc(), Point.step.desc()).limit(limit + 1)),
        ]
    merged = sorted(found, key=_place, reverse=True)
    return Page(merged[:limit], len(merged) > limit)


def _before(
    at: InstrumentedAttribute[float], number: InstrumentedAttribute[int], time: float, last: int
) -> ColumnElement[bool]:
    return or_(at < time, and_(at == time, number < last))


def _place(one: JobEvent | Point) -> tuple[float, int, int]:
    return (one.at, 1, one.id) if isinstance(one, JobEvent) else (one.at, 0, one.step)
