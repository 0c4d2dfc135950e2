"""Uploaded files and results as a user sees them: made, listed, removed, and needed by jobs.

    storing ─put→ uploaded ─check→ processed | error
       │             └──────┬─────────┘
       └─ its process died ─┴→ deleted ─→ ∅

Who is killed between a row and its bytes leaves a row that says so: `storing` and `deleted` are seen by nobody but
`remove_due`, which removes bytes first and row last. Nothing is ever removed from the store that no row has named.
"""

import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from sqlalchemy import ColumnElement, delete, or_, select, tuple_, update
from sqlalchemy.orm import Session

from jobs import filestore, keys, places
from jobs.database import Database, clock, now
from jobs.errors import FileNeeded, FileUnknown, StoreAway
from jobs.filestore import Incoming
from jobs.settings import Settings
from jobs.states import TERMINAL
from jobs.store import Page
from jobs.tables import Job, JobFile, StoredFile

log = logging.getLogger("stiefel.files")

UPLOADS = "fine-tune"
RESULTS = "fine-tune-results"
PURPOSES = (UPLOADS, RESULTS)
_ID = re.compile(r"file-[0-9a-f]{24}")
# A process that stores a file for longer than this is taken for dead.
_STORING_SECONDS = 3600
# A client that heard nothing sends a file again within this time.
_AGAIN_SECONDS = 900
_AT_ONCE = 100


class Status(StrEnum):
    STORING = "storing"
    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"
    DELETED = "deleted"


_SEEN = (Status.UPLOADED, Status.PROCESSED, Status.ERROR)


@dataclass(frozen=True)
class NewFile:
    owner: str
    filename: str
    purpose: str
    status: Status = Status.UPLOADED
    expires_after: int | None = None  # seconds
    columns: Mapping[str, str] = field(default_factory=dict)


def create(database: Database, settings: Settings, new: NewFile, incoming: Incoming) -> StoredFile:
    """∅ → storing → new.status. Raises QuotaExceeded and StoreAway; nothing of the file is left then."""
    with database.transaction() as session:
        keys.check_storage(session, new.owner, incoming.bytes)
        at = clock(session)
        stored = StoredFile(
            id=f"file-{secrets.token_hex(12)}",
            owner=new.owner,
            filename=new.filename,
            purpose=new.purpose,
            bytes=incoming.bytes,
            sha256=incoming.sha256,
            created_at=at,
            expires_at=None if new.expires_after is None else at + new.expires_after,
            status=Status.STORING,
            columns=dict(new.columns),
            statistics={},
            checked_until=at + _STORING_SECONDS,
        )
        session.add(stored)
    try:
        filestore.put(settings, stored, incoming)
    except StoreAway:
        _mark_deleted(database, stored.id)
        raise
    with database.transaction() as session:
        row = session.get(StoredFile, stored.id, with_for_update=True)
        if row is not None and row.status == Status.STORING:
            row.status, row.checked_until = new.status, None
        else:
            row = None
    if row is not None:
        if row.status != Status.UPLOADED:  # nobody here will look into it
            filestore.release(settings, row)
        return row
    # Taken for dead, and its row removed.
    filestore.remove(settings, stored)
    raise StoreAway("written", f"it took longer than {_STORING_SECONDS} s")


def sent_before(database: Database, new: NewFile, incoming: Incoming) -> StoredFile | None:
    """The same file of the same owner, uploaded a moment ago: the client did not hear of it and sends it again."""
    query = select(StoredFile).where(
        StoredFile.owner == new.owner,
        StoredFile.sha256 == incoming.sha256,
        StoredFile.filename == new.filename,
        StoredFile.purpose == new.purpose,
        StoredFile.status.in_(_SEEN),
        StoredFile.created_at > now() - _AGAIN_SECONDS,
    )
    with database.reading() as session:
        found = session.scalars(query.order_by(StoredFile.created_at.desc())).all()
    return next((stored for stored in found if stored.columns == dict(new.columns)), None)


def get(database: Database, file_id: str, of: str | None = None) -> StoredFile:
    """`of`: whose files the caller sees, None for everybody's. Raises FileUnknown."""
    with database.reading() as session:
        return _get(session, file_id, of)


def list_files(
    database: Database,
    of: str | None = None,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = 10_000,
    ascending: bool = False,
) -> Page[StoredFile]:
    """Newest first, or oldest. `after` is the id of the last file of the page before. Raises UnknownCursor."""
    place = tuple_(StoredFile.created_at, StoredFile.id)
    order = (StoredFile.created_at, StoredFile.id)
    query = select(StoredFile).where(StoredFile.status.in_(_SEEN)).limit(limit + 1)
    query = query.order_by(*(order if ascending else (column.desc() for column in order)))
    if of is not None:
        query = query.where(StoredFile.owner == of)
    if purpose is not None:
        if purpose not in PURPOSES:
            return Page([], False)
        query = query.where(StoredFile.purpose == purpose)
    with database.reading() as session:
        if after is not None:
            behind = places.behind(session, StoredFile, after, of, "file")
            query = query.where(place > behind if ascending else place < behind)
        found = session.scalars(query).all()
    return Page(found[:limit], len(found) > limit)


def need(session: Session, job_id: str, file_ids: Sequence[str], of: str | None) -> None:
    """The job needs the files until it has ended: from now on they are not removed. Raises FileUnknown.

    In the transaction that makes the job, after its row: who removes a file holds the file's row too.
    """
    for file_id in sorted(set(file_ids)):
        _get(session, file_id, of, hold=True)
        session.add(JobFile(job_id=job_id, file_id=file_id))


def remove(database: Database, settings: Settings, file_id: str, of: str | None = None) -> None:
    """→ ∅. Raises FileUnknown, and FileNeeded while a job that has not ended needs it.

    Where the store is away the bytes are removed later (`remove_due`); the file is gone for everybody else.
    """
    with database.transaction() as session:
        stored = _get(session, file_id, of, hold=True)
        unfinished = select(Job.id).join(JobFile, JobFile.job_id == Job.id)
        unfinished = unfinished.where(JobFile.file_id == file_id, Job.state.not_in(TERMINAL))
        if jobs := session.scalars(unfinished.order_by(Job.created_at)).all():
            raise FileNeeded(file_id, jobs)
        stored.status, stored.checked_until = Status.DELETED, None
    try:
        _erase(database, settings, stored)
    except StoreAway as error:
        log.warning("the bytes of %s are removed later: %s", file_id, error)


def remove_due(database: Database, settings: Settings) -> int:
    """What has expired, unless a job needs it; what a dead process has left; what could not be removed. How many."""
    abandoned = (StoredFile.status == Status.STORING) & (StoredFile.checked_until < now())
    expired = StoredFile.status.in_(_SEEN) & (StoredFile.expires_at < now()) & ~_needed()
    query = select(StoredFile).where(or_(StoredFile.status == Status.DELETED, abandoned, expired)).limit(_AT_ONCE)
    with database.reading() as session:
        due = session.scalars(query).all()
    removed = 0
    for stored in due:
        try:
            if stored.status in _SEEN:
                remove(database, settings, stored.id)
            else:
                _mark_deleted(database, stored.id)
                _erase(database, settings, stored)
            removed += 1
        except (FileNeeded, FileUnknown):
            continue  # somebody was quicker
        except StoreAway as error:
            log.warning("the bytes of %s are removed later: %s", stored.id, error)
            break
    return removed


def forget_copies(database: Database, settings: Settings) -> None:
    """Of files that are gone, and of those that no unfinished job needs and nobody has asked for lately: from this
    machine, not from the store. What the store has not got is no copy, and stays. Raises StoreAway."""
    copies = filestore.copies(settings)
    # Listed before they are looked up: a file's row is there before any copy of it.
    known = _known(database, list(copies)) if copies else {}
    for file_id, used in copies.items():
        if file_id not in known:
            filestore.forget_copy(settings, file_id)
            continue
        stored, needed = known[file_id]
        if needed or used:
            continue
        if filestore.is_stored(settings, stored):
            filestore.forget_copy(settings, file_id)
        else:
            log.warning("%s is here and not in %s: bring it there", file_id, settings.files_url)


def _known(database: Database, file_ids: Sequence[str]) -> dict[str, tuple[StoredFile, bool]]:
    """Of the files that are there: whether an unfinished job needs it."""
    found: dict[str, tuple[StoredFile, bool]] = {}
    with database.reading() as session:
        for begin in range(0, len(file_ids), _AT_ONCE):
            some = StoredFile.id.in_(file_ids[begin : begin + _AT_ONCE])
            there = select(StoredFile, _needed()).where(some, StoredFile.status != Status.DELETED)
            for stored, needed in session.execute(there):
                found[stored.id] = stored, needed
    return found


def _get(session: Session, file_id: str, of: str | None, hold: bool = False) -> StoredFile:
    stored = session.get(StoredFile, file_id, with_for_update=hold) if _ID.fullmatch(file_id) else None
    if stored is None or stored.status not in _SEEN or of not in (None, stored.owner):
        raise FileUnknown(file_id)
    return stored


def _needed() -> ColumnElement[bool]:
    unfinished = select(JobFile.file_id).join(Job, Job.id == JobFile.job_id)
    return unfinished.where(JobFile.file_id == StoredFile.id, Job.state.not_in(TERMINAL)).exists()


def _mark_deleted(database: Database, file_id: str) -> None:
    gone = update(StoredFile).where(StoredFile.id == file_id, StoredFile.status == Status.STORING)
    with database.transaction() as session:
        session.execute(gone.values(status=Status.DELETED, checked_until=None))


def _erase(database: Database, settings: Settings, stored: StoredFile) -> None:
    filestore.remove(settings, stored)
    with database.transaction() as session:
        places.leave(database, session, stored)
        session.execute(delete(JobFile).where(JobFile.file_id == stored.id))  # of jobs that have ended
        session.execute(delete(StoredFile).where(StoredFile.id == stored.id, StoredFile.status == Status.DELETED))
