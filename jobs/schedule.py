"""Who goes next: the order of the queue, why a job waits, and who makes room.

Higher priority first; of equal ones the job whose owner has the fewest running, so that a hundred jobs of one owner do
not keep out the one of another; then the one that has been queued longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, false, func, or_, select, tuple_
from sqlalchemy.orm import Session, aliased

from jobs import keys, workers
from jobs.database import Database, clock, now
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import Job, Worker

# Of the queue's head: more are not looked at by one worker at a time, nor preempted for.
_HEAD = 20


@dataclass(frozen=True)
class Waiting:
    """Why a queued job is not running yet. `unschedulable`: no worker that is up could ever take it."""

    unschedulable: bool
    reason: str


def candidates(database: Database, card: workers.Card) -> Sequence[Job]:
    """What the worker may try to claim, best first."""
    fitting = _in_order().where(Job.devices <= card.devices, Job.device.in_(("any", card.device)))
    with database.reading() as session:
        # Left out here already: else the queue's head could be theirs alone.
        allowed = fitting.where(Job.owner.not_in(keys.at_their_limit(session)))
        return session.scalars(allowed.limit(_HEAD)).all()


def waiting(database: Database, settings: Settings, job: Job) -> Waiting | None:
    """Of a queued job; None for any other."""
    if job.state != State.QUEUED:
        return None
    with database.reading() as session:
        at = clock(session)
        there = session.scalars(workers.up(settings)).all()
        fitting = [worker for worker in there if workers.fits(worker, job.device, job.devices)]
        if not fitting:
            return Waiting(True, _no_worker(job, there))
        if job.not_before > at:
            return Waiting(False, f"held back for another {job.not_before - at:.0f} s after a failure")
        if not keys.may_run_one_more(session, job.owner):
            return Waiting(False, "its API key has as many jobs running as it may, or no device hours left")
        if all(worker.drain_requested_at is not None for worker in fitting):
            return Waiting(False, "every worker that fits is drained")
        before = _before(session, job)
    return Waiting(False, f"{before} {'job is' if before == 1 else 'jobs are'} before it in the queue")


def unschedulable(session: Session, settings: Settings) -> int:
    """Queued jobs that no worker that is up could ever take; not of owners who may run no more: they wait for that."""
    there = session.scalars(workers.up(settings)).all()
    sizes = select(Job.device, Job.devices, func.count()).where(Job.state == State.QUEUED)
    sizes = sizes.where(Job.owner.not_in(keys.at_their_limit(session)))
    return sum(
        number
        for device, devices, number in session.execute(sizes.group_by(Job.device, Job.devices)).all()
        if not any(workers.fits(worker, device, devices) for worker in there)
    )


def startable(session: Session, settings: Settings) -> int:
    """Queued jobs that a worker which is up, idle and not drained could take now: for long, there should be none."""
    busy = select(Job.worker).where(Job.state == State.RUNNING, Job.worker.is_not(None))
    idle = workers.up(settings).where(Worker.drain_requested_at.is_(None), Worker.name.not_in(busy))
    could = _in_order().where(_fits_one_of(session.scalars(idle).all()), Job.owner.not_in(keys.at_their_limit(session)))
    return session.scalar(select(func.count()).select_from(could.order_by(None).subquery())) or 0


def preempt(database: Database, settings: Settings) -> int:
    """Ask running jobs to make room for queued ones of higher priority; returns how many.

    A job is asked only where no worker that fits the waiting one is idle or about to be. It checkpoints, is queued
    again and spends no attempt.
    """
    asked = 0
    with database.transaction() as session:
        there = [w for w in session.scalars(workers.up(settings)).all() if w.drain_requested_at is None]
        running = session.scalars(
            select(Job).where(Job.state == State.RUNNING).order_by(Job.id).with_for_update()
        ).all()
        on = {job.worker: job for job in running}
        free = {worker.name for worker in there if worker.name not in on or _is_leaving(on[worker.name])}
        urgent = _in_order().where(Job.priority > _lowest(running), _fits_one_of(there))
        urgent = urgent.where(Job.owner.not_in(keys.at_their_limit(session)))
        for job in session.scalars(urgent.limit(_HEAD)).all():
            fitting = [worker for worker in there if workers.fits(worker, job.device, job.devices)]
            idle = next((worker.name for worker in fitting if worker.name in free), None)
            if idle is not None:
                free.discard(idle)
                continue
            lower = [on[w.name] for w in fitting if w.name in on and on[w.name].priority < job.priority]
            lower = [other for other in lower if not _is_leaving(other)]
            if lower:
                # Of the lowest the one that started last: it has the least to repeat.
                victim = min(lower, key=lambda other: (other.priority, -(other.started_at or 0.0)))
                victim.preempt_requested_at = clock(session)
                asked += 1
    return asked


def _before(session: Session, job: Job) -> int:
    """How many claimable jobs `_in_order` has before this one."""
    running = select(Job.owner, func.count().label("jobs")).where(Job.state == State.RUNNING).group_by(Job.owner)
    of_owner = running.subquery()
    theirs, mine = func.coalesce(of_owner.c.jobs, 0), keys.count_jobs(session, job.owner, State.RUNNING)
    place = (-job.priority, mine, job.queued_at, job.id)
    earlier = _claimable().outerjoin(of_owner, of_owner.c.owner == Job.owner)
    earlier = earlier.where(tuple_(-Job.priority, theirs, Job.queued_at, Job.id) < place)
    return session.scalar(earlier.with_only_columns(func.count())) or 0


def _in_order() -> Select[Job]:
    """The claimable jobs."""
    running = aliased(Job)
    of_owner = (
        select(func.count())
        .where(running.owner == Job.owner, running.state == State.RUNNING)
        .correlate(Job)
        .scalar_subquery()
    )
    return _claimable().order_by(Job.priority.desc(), of_owner, Job.queued_at, Job.id)


def _claimable() -> Select[Job]:
    return select(Job).where(Job.state == State.QUEUED, Job.not_before <= now())


def _no_worker(job: Job, there: Sequence[Worker]) -> str:
    kind = "" if job.device == "any" else f"{job.device} "
    need = f"it needs {job.devices} {kind}{'device' if job.devices == 1 else 'devices'} of one worker"
    of_kind = [worker for worker in there if job.device in ("any", worker.device)]
    if not there:
        return f"{need}; no worker is up"
    if not of_kind:
        return f"{need}; no worker that is up has any"
    largest = max(of_kind, key=lambda worker: worker.devices)
    return f"{need}; the largest that is up, {largest.name}, has {largest.devices}"


def _fits_one_of(there: Sequence[Worker]) -> ColumnElement[bool]:
    sizes = [(Job.device.in_(("any", worker.device))) & (Job.devices <= worker.devices) for worker in there]
    return or_(false(), *sizes)


def _is_leaving(job: Job) -> bool:
    return any((job.preempt_requested_at, job.cancel_requested_at, job.pause_requested_at))


def _lowest(running: Sequence[Job]) -> int:
    return min((job.priority for job in running), default=2**31 - 1)
