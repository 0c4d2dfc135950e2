"""Who is there to take jobs: workers say so themselves, again and again, with what they have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Select, delete, select, update

from jobs.database import Database, clock, now
from jobs.errors import WorkerNotFound
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import Job, Worker

# A worker that has been away for so long is forgotten.
_FORGOTTEN_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Card:
    """What a worker says of itself. `gpus` are named as in CUDA_VISIBLE_DEVICES; without any, ranks run on CPUs."""

    name: str
    host: str
    version: str
    gpus: tuple[str, ...]
    devices: int

    @property
    def device(self) -> Literal["gpu", "cpu"]:
        return "gpu" if self.gpus else "cpu"


@dataclass(frozen=True)
class Storage:
    """Bytes of the file system with a worker's run directories."""

    size: int
    free: int


@dataclass(frozen=True)
class Seen:
    """A worker, whether it was heard of lately, and the job that it trains."""

    worker: Worker
    up: bool
    job_id: str | None


def seen(database: Database, card: Card, storage: Storage | None = None) -> bool:
    """A worker says that it is there, and what room it has; the answer is whether it is to take no new job."""
    values = {
        "host": card.host,
        "version": card.version,
        "device": card.device,
        "devices": card.devices,
        "gpus": ",".join(card.gpus),
        "seen_at": now(),
        "left_at": None,
        "storage_size_bytes": storage.size if storage else None,
        "storage_free_bytes": storage.free if storage else None,
    }
    with database.transaction() as session:
        statement = database.insert(Worker).values(name=card.name, registered_at=now(), **values)
        session.execute(statement.on_conflict_do_update(index_elements=["name"], set_=values))
        drained = session.scalar(select(Worker.drain_requested_at).where(Worker.name == card.name))
    return drained is not None


def left(database: Database, name: str) -> None:
    """A worker says goodbye. What was asked of it stays, in case it comes back."""
    with database.transaction() as session:
        session.execute(update(Worker).where(Worker.name == name).values(left_at=now()))


def drain(database: Database, name: str, stop_job: bool) -> Worker:
    """It takes no new job from now on. With `stop_job` the one that it trains checkpoints and is queued again.

    Twice, it changes nothing. Raises WorkerNotFound.
    """
    with database.transaction() as session:
        worker = session.get(Worker, name)
        if worker is None:
            raise WorkerNotFound(name)
        worker.drain_requested_at = worker.drain_requested_at or clock(session)
        if stop_job:
            mine = (Job.worker == name) & (Job.state == State.RUNNING) & Job.preempt_requested_at.is_(None)
            session.execute(update(Job).where(mine).values(preempt_requested_at=now()))
    return worker


def undrain(database: Database, name: str) -> Worker:
    """It takes jobs again. Raises WorkerNotFound."""
    with database.transaction() as session:
        worker = session.get(Worker, name)
        if worker is None:
            raise WorkerNotFound(name)
        worker.drain_requested_at = None
    return worker


def is_drained(database: Database, name: str) -> bool:
    with database.reading() as session:
        return session.scalar(select(Worker.drain_requested_at).where(Worker.name == name)) is not None


def list_workers(database: Database, settings: Settings) -> Sequence[Seen]:
    """By name; those that are away too, until they are forgotten."""
    with database.reading() as session:
        at = clock(session)
        trained = {job.worker: job.id for job in session.scalars(select(Job).where(Job.state == State.RUNNING))}
        workers = session.scalars(select(Worker).order_by(Worker.name)).all()
    return [Seen(worker, is_up(worker, at, settings), trained.get(worker.name)) for worker in workers]


def forget(database: Database) -> int:
    """Remove workers that have long been away and of which nothing is asked; returns how many."""
    away = (Worker.seen_at < now() - _FORGOTTEN_SECONDS) & Worker.drain_requested_at.is_(None)
    with database.transaction() as session:
        return len(session.execute(delete(Worker).where(away).returning(Worker.name)).all())


def up(settings: Settings) -> Select[Worker]:
    """The workers that are there."""
    return select(Worker).where(Worker.seen_at > now() - settings.worker_timeout, Worker.left_at.is_(None))


def is_up(worker: Worker, at: float, settings: Settings) -> bool:
    return worker.seen_at > at - settings.worker_timeout and worker.left_at is None


def fits(worker: Worker, device: str, devices: int) -> bool:
    """Whether the worker has so many devices of the kind (any, gpu, cpu)."""
    return worker.devices >= devices and device in ("any", worker.device)
