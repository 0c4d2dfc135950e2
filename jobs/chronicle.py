"""What happened to a job, its steps among it, newest first: as OpenAI lists events.

The order is that of storing, whatever the clocks of workers say: an event comes after the steps that it had `reached`,
and events in the order of their ids. So a page is found by (job_id, step) and (job_id, reached, id), however many
there are.
"""

from sqlalchemy import select, tuple_

from jobs.database import Database
from jobs.errors import UnknownCursor
from jobs.store import Page
from jobs.tables import JobEvent, Point

_LAST_STEP = 2**31 - 1  # that its column can hold


def newest(
    database: Database, job_id: str, after: tuple[type[JobEvent] | type[Point], int] | None, limit: int
) -> Page[JobEvent | Point]:
    """`after` is the last one of the page before, by its kind and number (an event's id, a point's step).

    A step may have been undone meanwhile. Raises UnknownCursor for an event that there is not.
    """
    events = select(JobEvent).where(JobEvent.job_id == job_id)
    points = select(Point).where(Point.job_id == job_id)
    with database.reading() as session:
        if after is not None:
            kind, number = after
            if kind is Point:
                number = min(number, _LAST_STEP)
                events, points = events.where(JobEvent.reached < number), points.where(Point.step < number)
            else:
                reached = session.scalar(
                    select(JobEvent.reached).where(JobEvent.job_id == job_id, JobEvent.id == number)
                )
                if reached is None:
                    raise UnknownCursor(str(number), "event")
                events = events.where(tuple_(JobEvent.reached, JobEvent.id) < (reached, number))
                points = points.where(Point.step <= reached)
        found: list[JobEvent | Point] = [
            *session.scalars(events.order_by(JobEvent.reached.desc(), JobEvent.id.desc()).limit(limit + 1)),
            *session.scalars(points.order_by(Point.step.desc()).limit(limit + 1)),
        ]
    merged = sorted(found, key=_place, reverse=True)
    return Page(merged[:limit], len(merged) > limit)


def _place(one: JobEvent | Point) -> tuple[int, int, int]:
    return (one.reached, 1, one.id) if isinstance(one, JobEvent) else (one.step, 0, 0)
