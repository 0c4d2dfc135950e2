"""API keys: who asks, what for, and how much they may use.

A key is shown once, when it is made: "sk-stiefel-", its public id, and 256 random bits, of which only a hash is kept.
Whoever has made a job sees it; a key with the scope admin sees all jobs.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from jobs.database import Database, clock
from jobs.errors import KeyNotFound, QuotaExceeded
from jobs.states import State
from jobs.tables import ApiKey, Job, StoredFile

_PREFIX = "sk-stiefel"
# A key's last use is written this often: not with every request.
_SECONDS_BETWEEN_USES = 60.0


class Scope(StrEnum):
    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


# What a scope brings with it.
_IMPLIED = {
    Scope.READ: {Scope.READ},
    Scope.WRITE: {Scope.READ, Scope.WRITE},
    Scope.ADMIN: {Scope.READ, Scope.WRITE, Scope.ADMIN},
}


@dataclass(frozen=True)
class Caller:
    """Who asks. `owner` is what the jobs they submit belong to."""

    owner: str
    scopes: frozenset[Scope]

    @property
    def sees(self) -> str | None:
        """Whose jobs they see; None: everybody's."""
        return None if Scope.ADMIN in self.scopes else self.owner


# Without API keys: whoever is on this machine.
EVERYBODY = Caller("", frozenset(Scope))


@dataclass(frozen=True)
class Quotas:
    """Of one key; None: without limit."""

    queued: int | None = None
    running: int | None = None
    device_hours: float | None = None
    storage_bytes: int | None = None


def create(database: Database, name: str, scopes: Sequence[Scope], quotas: Quotas) -> tuple[ApiKey, str]:
    """(the key's row, the key itself: it is not to be had again)."""
    secret = secrets.token_urlsafe(32)
    with database.transaction() as session:
        key = ApiKey(
            id=secrets.token_hex(6),
            name=name,
            secret_hash=_hash(secret),
            scopes=[str(scope) for scope in scopes],
            created_at=clock(session),
            max_queued=quotas.queued,
            max_running=quotas.running,
            max_device_hours=quotas.device_hours,
            max_storage_bytes=quotas.storage_bytes,
        )
        session.add(key)
    return key, f"{_PREFIX}-{key.id}-{secret}"


def revoke(database: Database, key_id: str) -> ApiKey:
    """Its requests are refused from now on; its jobs go on. Twice, it changes nothing. Raises KeyNotFound."""
    with database.transaction() as session:
        key = session.get(ApiKey, key_id)
        if key is None:
            raise KeyNotFound(key_id)
        key.revoked_at = key.revoked_at or clock(session)
    return key


def set_quotas(database: Database, key_id: str, quotas: Quotas) -> None:
    """Change those that are not None. Raises KeyNotFound."""
    given = {
        "max_queued": quotas.queued,
        "max_running": quotas.running,
        "max_device_hours": quotas.device_hours,
        "max_storage_bytes": quotas.storage_bytes,
    }
    with database.transaction() as session:
        key = session.get(ApiKey, key_id)
        if key is None:
            raise KeyNotFound(key_id)
        for name, value in given.items():
            if value is not None:
                setattr(key, name, value)


def list_keys(database: Database) -> Sequence[ApiKey]:
    """Oldest first."""
    with database.reading() as session:
        return session.scalars(select(ApiKey).order_by(ApiKey.created_at)).all()


def identify(database: Database, presented: str) -> Caller | None:
    """Whose key it is; None for one that is unknown, wrong or revoked."""
    key_id, _, secret = presented.removeprefix(f"{_PREFIX}-").partition("-")
    if not presented.startswith(f"{_PREFIX}-") or "\x00" in presented:
        return None
    with database.reading() as session:
        key = session.get(ApiKey, key_id)
        at = clock(session)
    if key is None or key.revoked_at is not None or not hmac.compare_digest(key.secret_hash, _hash(secret)):
        return None
    if at > (key.last_used_at or 0.0) + _SECONDS_BETWEEN_USES:
        with database.transaction() as session:
            session.execute(update(ApiKey).where(ApiKey.id == key.id).values(last_used_at=at))
    granted = {Scope(scope) for scope in key.scopes}
    return Caller(key.id, frozenset().union(*(_IMPLIED[scope] for scope in granted)))


def check_quotas(session: Session, owner: str) -> None:
    """Whether one more job may be submitted. Raises QuotaExceeded."""
    key = held(session, owner)
    if key is not None and key.max_queued is not None:
        queued = count_jobs(session, owner, State.QUEUED, State.PAUSED)
        if queued >= key.max_queued:
            remedy = "wait until some have started, or cancel some"
            raise QuotaExceeded("queued jobs", str(queued), str(key.max_queued), remedy)
    check_resources(session, owner)


def check_resources(session: Session, owner: str) -> None:
    """Whether there is device time and storage left for a job that is to be queued. Raises QuotaExceeded."""
    key = held(session, owner)
    if key is None:
        return
    if device_hours_used_up(key):
        used, limit = f"{key.device_seconds / 3600:.2f}", f"{key.max_device_hours:g}"
        raise QuotaExceeded("device hours", used, limit, "ask the operator for more (stiefel keys set)")
    check_storage(session, owner, 0)


def check_storage(session: Session, owner: str, more: int) -> None:
    """Whether there is storage left, and enough for `more` bytes. Raises QuotaExceeded."""
    key = held(session, owner)
    if key is None or key.max_storage_bytes is None:
        return
    runs = session.scalar(select(func.sum(Job.storage_bytes)).where(Job.owner == owner)) or 0
    # PostgreSQL's sum of large integers is a Decimal.
    stored = int(runs) + int(session.scalar(select(func.sum(StoredFile.bytes)).where(StoredFile.owner == owner)) or 0)
    if stored >= key.max_storage_bytes or stored + more > key.max_storage_bytes:
        remedy = "delete jobs that have ended (DELETE /v1/jobs/{id}) or files (DELETE /v1/files/{id})"
        used = f"{stored:,}" if not more else f"{stored:,} and would use {stored + more:,}"
        raise QuotaExceeded("storage bytes", used, f"{key.max_storage_bytes:,}", remedy)


def may_run_one_more(session: Session, owner: str) -> bool:
    """Whether a job of theirs may start now."""
    key = session.get(ApiKey, owner)
    if key is None:
        return True
    if key.max_running is not None and count_jobs(session, owner, State.RUNNING) >= key.max_running:
        return False
    return not device_hours_used_up(key)


def at_their_limit(session: Session) -> list[str]:
    """The owners of whom no further job may start now."""
    limited = ApiKey.max_running.is_not(None) | ApiKey.max_device_hours.is_not(None)
    owners = session.scalars(select(ApiKey.id).where(limited)).all()
    return [owner for owner in owners if not may_run_one_more(session, owner)]


def device_hours_used_up(key: ApiKey) -> bool:
    return key.max_device_hours is not None and key.device_seconds >= key.max_device_hours * 3600


def held(session: Session, owner: str) -> ApiKey | None:
    """The key, until the transaction ends, so that who counts its jobs and adds one is alone; None without an owner."""
    return session.scalar(select(ApiKey).where(ApiKey.id == owner).with_for_update()) if owner else None


def count_jobs(session: Session, owner: str, *states: State) -> int:
    counted = select(func.count()).select_from(Job).where(Job.owner == owner, Job.state.in_(states))
    return session.scalar(counted) or 0


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
