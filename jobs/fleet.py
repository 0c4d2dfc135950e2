"""One look at everything, for Prometheus and for readiness."""

from collections import Counter as Counted
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from jobs import schedule, workers
from jobs.database import Database, clock, now
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import Counter, Delivery, Job, Outbox, StoredFile
from jobs.workers import Storage

# Per-job series: running jobs and those that ended this recently, and not more than so many.
RECENT_SECONDS = 600
MOST_JOBS = 1000


@dataclass(frozen=True)
class Fleet:
    jobs_by_state: dict[tuple[str, str], int]  # (state, method) → count
    queued: int
    oldest_queued_seconds: float
    announcements_due: int  # and not published
    deliveries_pending: int  # webhooks' messages that have neither arrived nor been given up
    deliveries_due: int  # of them, those whose time has come
    unschedulable: int  # queued jobs that no worker that is up could ever take
    startable: int  # queued jobs that an idle worker could take now
    files: int
    files_bytes: int
    workers_up: int
    workers_busy: int
    workers_drained: int
    devices: dict[tuple[str, str], int]  # (gpu or cpu, busy or idle) → number, of the workers that are up
    storage: dict[str, Storage]  # by worker, of those that are up and have said it
    counters: Sequence[Counter]
    jobs: Sequence[Job]  # running or recently ended
    jobs_left_out: int
    at: float


def snapshot(database: Database, settings: Settings, of: str | None = None) -> Fleet:
    """`of`: whose jobs are shown one by one; None for everybody's. All are counted."""
    with database.reading() as session:
        at = clock(session)
        grouped = session.execute(select(Job.state, Job.method, func.count()).group_by(Job.state, Job.method)).all()
        oldest = session.scalar(select(func.min(Job.queued_at)).where(Job.state == State.QUEUED))
        up = session.scalars(workers.up(settings)).all()
        leased = select(Job.worker).where(Job.state == State.RUNNING, Job.lease_expires_at > at)
        busy = session.scalars(leased).all()
        shown = (Job.state == State.RUNNING) | (Job.finished_at > at - RECENT_SECONDS)
        if of is not None:
            shown &= Job.owner == of
        total = session.scalar(select(func.count()).select_from(Job).where(shown)) or 0
        jobs = session.scalars(select(Job).where(shown).order_by(Job.created_at.desc()).limit(MOST_JOBS)).all()
        rows = session.scalars(select(Counter)).all()
        due = session.scalar(select(func.count()).select_from(Outbox).where(Outbox.due_at <= at)) or 0
        pending = session.scalar(select(func.count()).select_from(Delivery).where(Delivery.due_at.is_not(None))) or 0
        overdue = session.scalar(select(func.count()).select_from(Delivery).where(Delivery.due_at <= at)) or 0
        files, files_bytes = session.execute(select(func.count(), func.sum(StoredFile.bytes))).one()
        unschedulable = schedule.unschedulable(session, settings)
        startable = schedule.startable(session, settings)
    devices: Counted[tuple[str, str]] = Counted()
    for worker in up:
        devices[worker.device, "busy" if worker.name in busy else "idle"] += worker.devices
    storage = {
        worker.name: Storage(worker.storage_size_bytes, worker.storage_free_bytes)
        for worker in up
        if worker.storage_size_bytes is not None and worker.storage_free_bytes is not None
    }
    return Fleet(
        jobs_by_state={(state, method): number for state, method, number in grouped},
        queued=sum(number for state, _, number in grouped if state == State.QUEUED),
        oldest_queued_seconds=at - oldest if oldest is not None else 0.0,
        announcements_due=due,
        deliveries_pending=pending,
        deliveries_due=overdue,
        files=files,
        files_bytes=int(files_bytes or 0),
        unschedulable=unschedulable,
        startable=startable,
        workers_up=len(up),
        workers_busy=len(busy),
        workers_drained=sum(worker.drain_requested_at is not None for worker in up),
        devices=dict(devices),
        storage=storage,
        counters=rows,
        jobs=jobs,
        jobs_left_out=total - len(jobs),
        at=at,
    )


def ping(database: Database) -> None:
    """Raises whatever the database raises when it cannot be asked."""
    with database.reading() as session:
        session.execute(select(now()))
        session.execute(select(func.count()).select_from(Job)).scalar_one()
