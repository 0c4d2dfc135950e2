"""What must happen without anybody asking: publish announcements, notice lost workers, ring again for forgotten jobs.

Every function is one small transaction that finds its own work, so it does not matter how many processes call it.
"""

import logging
from collections.abc import Callable, Mapping

from sqlalchemy import ColumnElement, delete, func, or_, select, update

from jobs import lease as leases
from jobs.database import Database, clock, now
from jobs.journal import announce_later
from jobs.queue import queue_of
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import Job, Outbox

log = logging.getLogger("stiefel.reaper")

# How many rows one call takes on: the rest is there at the next one.
_AT_ONCE = 100
# So many messages more than jobs are nothing to speak of.
_SPARE = 100


def publish_due(
    database: Database, settings: Settings, publish: Callable[[str, str], None], job_id: str | None = None
) -> int:
    """Publish (queue, job id) of what is due in the outbox, of one job or of all; returns how many.

    A row is deleted only after the broker has taken its message: published twice is harmless, not at all is not.
    Whatever `publish` raises passes through, and the row stays.
    """
    query = select(Outbox, Job.device, Job.devices).outerjoin(Job, Job.id == Outbox.job_id)
    query = query.where(Outbox.due_at <= now()).order_by(Outbox.id).limit(_AT_ONCE)
    if job_id is not None:
        query = query.where(Outbox.job_id == job_id)
    with database.reading() as session:
        due = session.execute(query).all()
    for row, device, devices in due:
        if device is not None and devices is not None:  # else the job was deleted meanwhile
            publish(queue_of(settings, device, devices), row.job_id)
        with database.transaction() as session:
            session.execute(delete(Outbox).where(Outbox.id == row.id))
            session.execute(update(Job).where(Job.id == row.job_id).values(announced_at=now()))
    return len(due)


def requeue_lost(database: Database, settings: Settings) -> int:
    """running with an expired lease → queued, or failed or cancelled; returns how many. The old fence is void."""
    lost = select(Job.id).where(Job.state == State.RUNNING, Job.lease_expires_at < now()).limit(_AT_ONCE)
    with database.reading() as session:
        found = session.scalars(lost).all()
    requeued = 0
    for job_id in found:
        # One at a time: each also holds its owner's key.
        with database.transaction() as session:
            job = session.scalar(lost.with_only_columns(Job).where(Job.id == job_id).with_for_update(skip_locked=True))
            if job is not None:
                ids = {"job_id": job.id, "attempt": job.fence, "request_id": job.request_id}
                worker, state = job.worker, leases.lose(database, settings, session, job)
                log.warning("worker %s was lost, the job is %s", worker, state, extra=ids)
                requeued += 1
    return requeued


def announce_soon(database: Database, settings: Settings, job_id: str) -> None:
    """A worker that was rung for a job leaves it to others: they are told, where it still waits."""
    with database.transaction() as session:
        waits = session.scalar(select(Job.id).where(Job.id == job_id, Job.state == State.QUEUED))
        pending = session.scalar(select(Outbox.id).where(Outbox.job_id == job_id))
        if waits is not None and pending is None:
            announce_later(session, job_id, settings.upkeep_seconds)


def queues(database: Database, settings: Settings) -> dict[str, int]:
    """How many jobs could be claimed from each queue that has any."""
    return {queue_of(settings, *size): number for size, number in _sizes(database).items()}


def announce_again(database: Database, settings: Settings, waiting: Mapping[str, int]) -> int:
    """Put queued jobs whose announcement is old back into the outbox; returns how many.

    Not those of a queue in which the broker holds at least as many messages (`waiting`) as there are jobs: then the
    workers are merely busy, or none fits.
    """
    forgotten = [
        (Job.device == device) & (Job.devices == devices)
        for (device, devices), jobs in _sizes(database).items()
        if waiting.get(queue_of(settings, device, devices), 0) < jobs
    ]
    if not forgotten:
        return 0
    stale = (
        select(Job.id)
        .where(
            _claimable(),
            or_(*forgotten),
            Job.queued_at < now() - settings.reannounce_seconds,
            func.coalesce(Job.announced_at, 0.0) < now() - settings.reannounce_seconds,
            ~select(Outbox.id).where(Outbox.job_id == Job.id).exists(),
        )
        .order_by(Job.queued_at)
        .limit(_AT_ONCE)
    )
    with database.transaction() as session:
        at = clock(session)
        found = session.scalars(stale).all()
        session.add_all(Outbox(job_id=job_id, due_at=at) for job_id in found)
    return len(found)


def overfull(waiting: Mapping[str, int], jobs: Mapping[str, int]) -> dict[str, int]:
    """The queues in which the broker holds far more messages than there are jobs, and how many to keep.

    Nobody takes them where workers are started for each job and do not listen (`python -m worker --once`).
    """
    return {queue: jobs[queue] + _SPARE for queue, messages in waiting.items() if messages > jobs[queue] + 2 * _SPARE}


def _sizes(database: Database) -> dict[tuple[str, int], int]:
    """(device, devices) → how many jobs could be claimed."""
    query = select(Job.device, Job.devices, func.count()).where(_claimable()).group_by(Job.device, Job.devices)
    with database.reading() as session:
        return {(device, devices): number for device, devices, number in session.execute(query)}


def _claimable() -> ColumnElement[bool]:
    return (Job.state == State.QUEUED) & (Job.not_before <= now())
