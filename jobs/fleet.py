"""One look at everything, for Prometheus and for readiness."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from jobs.database import Database, now
from jobs.states import State
from jobs.store import clock
from jobs.tables import Counter, Job, Worker

# Per-job series: running jobs and those that ended this recently, and not more than so many.
RECENT_SECONDS = 600
MOST_JOBS = 1000


@dataclass(frozen=True)
class Fleet:
    jobs_by_state: dict[tuple[str, str], int]  # (state, method) → count
    oldest_queued_seconds: float
    workers_up: int
    workers_busy: int
    gpus_idle: int
    gpus_busy: int
    counters: Sequence[Counter]
    jobs: Sequence[Job]  # running or recently ended
    jobs_left_out: int
    at: float


def snapshot(database: Database, worker_timeout: float) -> Fleet:
    """A worker counts as up when it was seen within `worker_timeout` seconds."""
    with database.reading() as session:
        at = clock(session)
        grouped = session.execute(select(Job.state, Job.method, func.count()).group_by(Job.state, Job.method)).all()
        oldest = session.scalar(select(func.min(Job.queued_at)).where(Job.state == State.QUEUED))
        workers = session.scalars(select(Worker).where(Worker.seen_at > at - worker_timeout)).all()
        leased = select(Job.worker).where(Job.state == State.RUNNING, Job.lease_expires_at > at)
        busy = session.scalars(leased).all()
        shown = (Job.state == State.RUNNING) | (Job.finished_at > at - RECENT_SECONDS)
        total = session.scalar(select(func.count()).select_from(Job).where(shown)) or 0
        jobs = session.scalars(select(Job).where(shown).order_by(Job.created_at.desc()).limit(MOST_JOBS)).all()
        counters = session.scalars(select(Counter)).all()
    return Fleet(
        jobs_by_state={(state, method): number for state, method, number in grouped},
        oldest_queued_seconds=at - oldest if oldest is not None else 0.0,
        workers_up=len(workers),
        workers_busy=len(busy),
        gpus_idle=sum(_gpus(worker) for worker in workers if worker.name not in busy),
        gpus_busy=sum(_gpus(worker) for worker in workers if worker.name in busy),
        counters=counters,
        jobs=jobs,
        jobs_left_out=total - len(jobs),
        at=at,
    )


def _gpus(worker: Worker) -> int:
    """GPUs that the worker was given; one slot where it was given none by name."""
    return len(worker.gpus.split(",")) if worker.gpus else 1


def ping(database: Database) -> None:
    """Raises whatever the database raises when it cannot be asked."""
    with database.reading() as session:
        session.execute(select(now()))
        session.execute(select(func.count()).select_from(Job)).scalar_one()
