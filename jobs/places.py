"""Where a page of a list begins: behind its cursor, also where that has been removed since."""

from typing import TypeVar

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from jobs.database import Database, now
from jobs.errors import UnknownCursor
from jobs.tables import Job, Removed, StoredFile, Webhook

_KEPT_SECONDS = 86400.0

Listed = TypeVar("Listed", Job, StoredFile, Webhook)


def behind(session: Session, table: type[Listed], after: str, of: str | None, kind: str) -> tuple[float, str]:
    """(created_at, id) of the last one of the page before. Raises UnknownCursor, also for somebody else's."""
    last: Listed | Removed | None = None
    if "\x00" not in after:  # which PostgreSQL cannot even be asked for
        last = session.get(table, after) or session.get(Removed, after)
    if last is None or of not in (None, last.owner):
        raise UnknownCursor(after, kind)
    return last.created_at, last.id


def leave(database: Database, session: Session, gone: Listed) -> None:
    """In the transaction that removes it; twice, it changes nothing."""
    place = database.insert(Removed).values(id=gone.id, owner=gone.owner, created_at=gone.created_at, removed_at=now())
    session.execute(place.on_conflict_do_nothing())


def forget(database: Database) -> None:
    """Those whose readers have long turned the page."""
    old = Removed.removed_at < now() - _KEPT_SECONDS
    with database.reading() as session:
        if session.scalar(select(Removed.id).where(old).limit(1)) is None:  # as nearly always
            return
    with database.transaction() as session:
        session.execute(delete(Removed).where(old))
