"""A job's events and steps in one list, page by page. On SQLite and on PostgreSQL."""

from typing import Any

import pytest
from sqlalchemy import event, select

from jobs import chronicle, wishes
from jobs import lease as leases
from jobs.database import Database
from jobs.errors import UnknownCursor
from jobs.lease import Outcome
from jobs.settings import Settings
from jobs.tables import JobEvent, Point
from tests.jobs.test_lease import claim, record, started, step, submit
from trainer import events

Told = list[str | int]


def told(database: Database, job_id: str, limit: int) -> Told:
    """All pages, newest first: events by their types, points by their steps."""
    after: tuple[type[JobEvent] | type[Point], int] | None = None
    found: Told = []
    while True:
        page = chronicle.newest(database, job_id, after, limit)
        found += [one.type if isinstance(one, JobEvent) else one.step for one in page.items]
        if not page.has_more:
            return found
        last = page.items[-1]
        after = (JobEvent, last.id) if isinstance(last, JobEvent) else (Point, last.step)


def evaluated(number: int) -> events.Evaluated:
    return events.Evaluated(step=number, loss=1.0, perplexity=2.7, sequences=1, seconds=1.0)


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_what_was_stored_last_comes_first_whatever_the_clocks_say(
    database: Database, settings: Settings, limit: int
) -> None:
    job = submit(database, settings)
    first = claim(database, settings, job)
    steps = [step(number, 1.0) for number in range(1, 5)]
    record(database, first, [started(0), *steps[:2], evaluated(2), *steps[2:]], 1)
    leases.finish(database, settings, first, Outcome("stopped", 0))
    second = claim(database, settings, job)
    # By the clock of its machine the second attempt was long before the first; it begins behind step 2.
    again = [step(number, 0.5).model_copy(update={"at": 1000.0 - number}) for number in (3, 4, 5)]
    record(database, second, [started(2), *again], 2)
    wishes.pause(database, job.id)
    assert told(database, job.id, limit) == (
        ["pause_requested", 5, 4, 3, "started", "claimed", "queued", "evaluated", 2, 1, "started", "claimed", "queued"]
    )


def test_a_page_goes_on_behind_a_step_that_was_undone_and_not_behind_an_event_that_never_was(
    database: Database, settings: Settings
) -> None:
    job = submit(database, settings)
    lease = claim(database, settings, job)
    record(database, lease, [started(0), *(step(number, 1.0) for number in range(1, 9))], 1)
    record(database, lease, [started(4)], 2)
    assert len(chronicle.newest(database, job.id, (Point, 10**17), 1).items) == 1
    page = chronicle.newest(database, job.id, (Point, 7), 3)
    assert [one.type if isinstance(one, JobEvent) else one.step for one in page.items] == ["started", 4, 3]
    other = submit(database, settings)
    with database.reading() as session:
        elsewhere = session.scalars(select(JobEvent.id).where(JobEvent.job_id == other.id)).one()
    for unknown in (10**9, elsewhere):
        with pytest.raises(UnknownCursor):
            chronicle.newest(database, job.id, (JobEvent, unknown), 3)


def test_a_page_is_read_from_an_index_without_sorting(database: Database, settings: Settings) -> None:
    if database.engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL reads so small a table whole")
    job = submit(database, settings)
    asked: list[tuple[str, object]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: object, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    record(database, claim(database, settings, job), [started(0), step(1, 1.0), evaluated(1), step(2, 1.0)], 1)
    with database.reading() as session:
        number = session.scalars(select(JobEvent.id).where(JobEvent.type == "evaluated")).one()
    asked.clear()
    chronicle.newest(database, job.id, None, 3)
    chronicle.newest(database, job.id, (Point, 2), 3)
    chronicle.newest(database, job.id, (JobEvent, number), 3)
    questions = [one for one in asked if one[0].startswith("SELECT")]
    assert len(questions) == 7
    with database.engine.connect() as connection:
        for question, parameters in questions:
            plan = [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {question}", parameters)]
            assert len(plan) == 1 and plan[0].startswith("SEARCH"), plan
