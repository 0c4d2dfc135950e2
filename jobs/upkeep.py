"""What must happen without anybody asking: publish announcements, notice lost workers, ring again for forgotten jobs.

Every function is one small transaction that finds its own work, so it does not matter how many processes call it.
"""

from collections.abc import Callable

from sqlalchemy import delete, func, select, update

from jobs import counters
from jobs.database import Database, now
from jobs.lease import end_attempt, leave, wished
from jobs.settings import Settings
from jobs.states import State
from jobs.store import clock
from jobs.tables import Job, Outbox, Worker

# How many rows one call takes on: the rest is there at the next one.
_AT_ONCE = 100

LOST = {
    "code": "infrastructure",
    "message": "the worker was not heard of before its lease ran out: it was killed, or its machine or network failed",
}


def publish_due(database: Database, publish: Callable[[str], None], job_id: str | None = None) -> int:
    """Publish what is due in the outbox, of one job or of all; returns how many.

    A row is deleted only after the broker has taken its message: published twice is harmless, not at all is not.
    Whatever `publish` raises passes through, and the row stays.
    """
    query = select(Outbox).where(Outbox.due_at <= now()).order_by(Outbox.id).limit(_AT_ONCE)
    if job_id is not None:
        query = query.where(Outbox.job_id == job_id)
    with database.reading() as session:
        due = session.scalars(query).all()
    for row in due:
        publish(row.job_id)
        with database.transaction() as session:
            session.execute(delete(Outbox).where(Outbox.id == row.id))
            session.execute(update(Job).where(Job.id == row.job_id).values(announced_at=now()))
    return len(due)


def requeue_lost(database: Database, settings: Settings) -> int:
    """running with an expired lease → queued, or failed or cancelled; returns how many. The old fence is void."""
    lost = (
        select(Job)
        .where(Job.state == State.RUNNING, Job.lease_expires_at < now())
        .limit(_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    with database.transaction() as session:
        jobs = session.scalars(lost).all()
        for job in jobs:
            failures = job.failures + 1
            end_attempt(session, job.id, job.fence, "lost", LOST, None)
            counters.add(database, session, "leases_expired", "", 1)
            counters.add(database, session, "attempt_failures", "infrastructure", 1)
            # The lost worker may wake up: a new fence now, not only at the next claim, makes its writes void.
            job.fence += 1
            state = wished(job, State.QUEUED if failures < job.max_attempts else State.FAILED)
            leave(database, session, job, state, 0.0, failures, LOST)
    return len(jobs)


def announce_again(database: Database, settings: Settings, waiting_messages: int) -> int:
    """Put queued jobs whose announcement is old back into the outbox; returns how many.

    Not while the broker holds at least as many messages as there are queued jobs: then the workers are merely busy.
    """
    claimable = (Job.state == State.QUEUED) & (Job.not_before <= now())
    with database.transaction() as session:
        queued = session.scalar(select(func.count()).select_from(Job).where(claimable)) or 0
        if waiting_messages >= queued:
            return 0
        stale = (
            select(Job.id)
            .where(
                claimable,
                Job.queued_at < now() - settings.reannounce_seconds,
                func.coalesce(Job.announced_at, 0.0) < now() - settings.reannounce_seconds,
                ~select(Outbox.id).where(Outbox.job_id == Job.id).exists(),
            )
            .order_by(Job.queued_at)
            .limit(_AT_ONCE)
        )
        found = session.scalars(stale).all()
        at = clock(session)
        session.add_all(Outbox(job_id=job_id, due_at=at) for job_id in found)
    return len(found)


def worker_seen(database: Database, name: str, gpus: str) -> None:
    """A worker says that it is there."""
    with database.transaction() as session:
        statement = database.insert(Worker).values(name=name, gpus=gpus, seen_at=now())
        update_row = {"gpus": gpus, "seen_at": now()}
        session.execute(statement.on_conflict_do_update(index_elements=["name"], set_=update_row))


def worker_gone(database: Database, name: str) -> None:
    """A worker says goodbye."""
    with database.transaction() as session:
        session.execute(delete(Worker).where(Worker.name == name))
