"""Who pages through a list while things are removed from it misses nothing. On SQLite and on PostgreSQL."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select, update

from jobs import files, places, store, webhooks, wishes
from jobs.database import Database, now
from jobs.errors import UnknownCursor
from jobs.settings import Settings
from jobs.store import Page
from jobs.tables import Removed
from tests.jobs.test_files import stored
from tests.jobs.test_lease import submit
from tests.jobs.test_webhooks import hook

Made = Callable[[Database, Settings], str]
Gone = Callable[[Database, Settings, str], object]
Listed = Callable[[Database, str | None, str | None], Page[Any]]


def job(database: Database, settings: Settings) -> str:
    return wishes.cancel(database, settings, submit(database, settings).id).id


KINDS: dict[str, tuple[Made, Gone, Listed]] = {
    "jobs": (
        job,
        lambda database, settings, one: wishes.remove(database, one),
        lambda database, of, after: store.list_jobs(database, of, after=after, limit=2),
    ),
    "files": (
        lambda database, settings: stored(database, settings, name="x").id,
        lambda database, settings, one: files.remove(database, settings, one),
        lambda database, of, after: files.list_files(database, of, after=after, limit=2),
    ),
    "webhooks": (
        lambda database, settings: hook(database, settings, "http://127.0.0.1:9/").id,
        lambda database, settings, one: webhooks.remove(database, one, None),
        lambda database, of, after: webhooks.list_webhooks(database, of, after, 2),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_goes_on_behind_what_was_removed_after_the_page_before(
    database: Database, settings: Settings, kind: str
) -> None:
    make, remove, listed = KINDS[kind]
    made = [make(database, settings) for _ in range(5)][::-1]
    first = listed(database, "", None)
    assert [one.id for one in first.items] == made[:2]
    for one in made[:3]:
        remove(database, settings, one)
    page = listed(database, "", made[1])
    assert ([one.id for one in page.items], page.has_more) == (made[3:], False)
    for of, after in (("somebody else", made[1]), ("", "never-was")):
        with pytest.raises(UnknownCursor):
            listed(database, of, after)


def test_what_was_removed_long_ago_is_forgotten(database: Database, settings: Settings) -> None:
    old, young = (hook(database, settings, "http://127.0.0.1:9/").id for _ in range(2))
    for one in (old, young):
        webhooks.remove(database, one, None)
    places.forget(database)
    with database.transaction() as session:
        session.execute(update(Removed).where(Removed.id == old).values(removed_at=now() - 90_000))
    places.forget(database)
    with database.reading() as session:
        assert session.scalars(select(Removed.id)).all() == [young]


def test_two_that_remove_the_same_leave_one_place(database: Database, settings: Settings) -> None:
    row = store.get(database, job(database, settings))

    def leave(_: int) -> None:
        with database.transaction() as session:
            places.leave(database, session, row)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, range(8)))
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Removed)) == 1
