"""The right to run a job, and everything that is written under it.

A claim bumps the job's fence; (job, fence) is the lease. Every write names both and takes effect only while the fence
stands and the job is running, so a worker that was thought lost and wakes up again changes nothing.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from jobs import counters, failures, keys, results, webhooks
from jobs.database import Database, clock, now
from jobs.errors import LeaseLost
from jobs.journal import add_event, announce_later
from jobs.settings import Settings
from jobs.states import TERMINAL, State
from jobs.tables import ApiKey, Attempt, CheckpointRow, Job, Worker

LOST = {
    "code": "infrastructure",
    "message": "the worker was not heard of before its lease ran out: it was killed, or its machine or network failed",
}


@dataclass(frozen=True)
class Lease:
    job_id: str
    fence: int


@dataclass(frozen=True)
class Wishes:
    """What is wanted of a running job: by its user, or by a job of higher priority. `held`: steps of its checkpoints
    that are to stay, since jobs that have not ended start from them."""

    cancel: bool = False
    pause: bool = False
    preempt: bool = False
    held: frozenset[int] = frozenset()

    @property
    def stop(self) -> bool:
        return self.cancel or self.pause or self.preempt


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `succeeded`, `stopped` (because it was asked to) or `failed`.

    `error["code"]` is a class of `jobs.failures`; whether the job is tried again is its own policy's to say.
    """

    kind: str
    exit_code: int | None = None
    error: dict[str, Any] | None = None


def claim(
    database: Database, settings: Settings, job_id: str, worker: str, announced: str | None = None
) -> Lease | None:
    """queued → running. None where the job is not queued, is still held back after a failure, its owner may run no
    more, or the worker is to take no more.

    A job whose worker was lost is not claimed over: the reaper queues it first, and counts the loss. Where the worker
    was rung for another job, `announced`, that one is announced again: someone else may be idle.
    """
    with database.transaction() as session:
        # Held, so that whoever drains the worker waits until this claim is seen.
        drained = select(Worker.drain_requested_at).where(Worker.name == worker).with_for_update()
        if session.scalar(drained) is not None:
            return None
        queued = select(Job).where(Job.id == job_id, Job.state == State.QUEUED, Job.not_before <= now())
        job = session.scalar(queued.with_for_update())
        if job is None:
            return None
        keys.held(session, job.owner)
        if not keys.may_run_one_more(session, job.owner):
            return None
        at = clock(session)
        job.state, job.fence, job.worker = State.RUNNING, job.fence + 1, worker
        job.lease_expires_at = at + settings.lease_seconds
        job.error, job.charged_until = None, at
        job.started_at = job.started_at or at
        counters.observe(database, session, counters.QUEUE_WAIT, at - job.queued_at)
        session.add(Attempt(job_id=job_id, fence=job.fence, worker=worker, started_at=at))
        add_event(session, job, "claimed", None, {"worker": worker, "attempt": job.fence})
        if announced not in (None, job_id):
            assert announced is not None
            if session.scalar(select(Job.state).where(Job.id == announced)) == State.QUEUED:
                announce_later(session, announced, 0.0)
        return Lease(job_id, job.fence)


def wishes(database: Database, lease: Lease) -> Wishes:
    """What is wanted, without renewing anything. Raises LeaseLost."""
    with database.reading() as session:
        return _wishes(session, _standing(session.get(Job, lease.job_id), lease))


def beat(database: Database, settings: Settings, lease: Lease) -> Wishes:
    """Renew the lease, account for the device time, and see what is wanted. Raises LeaseLost."""
    with database.transaction() as session:
        job = locked(session, lease)
        at = clock(session)
        job.lease_expires_at = at + settings.lease_seconds
        key = _charge(session, job, at)
        if key is not None and keys.device_hours_used_up(key) and job.pause_requested_at is None:
            job.pause_requested_at = at
            limit = key.max_device_hours
            add_event(session, job, "pause_requested", None, {"reason": f"all {limit:g} device hours are used up"})
        return _wishes(session, job)


def measured(database: Database, lease: Lease, storage_bytes: int) -> None:
    """So large is the run directory. Raises LeaseLost."""
    with database.transaction() as session:
        locked(session, lease).storage_bytes = storage_bytes


def finish(database: Database, settings: Settings, lease: Lease, outcome: Outcome) -> State:
    """running → succeeded | failed | queued | cancelled | paused; which, is decided here alone. Raises LeaseLost.

    Stopped without anybody's wish means that the worker is shutting down, or that the job was preempted: it goes back
    to the queue and loses no attempt.
    """
    with database.transaction() as session:
        job = locked(session, lease)
        _charge(session, job, clock(session))
        delay, error = 0.0, outcome.error
        if outcome.kind == "succeeded":
            state = State.SUCCEEDED
        elif outcome.kind == "stopped":
            state = wished(job, State.QUEUED)
        else:
            error = error or {"code": "unknown", "message": "the attempt failed"}
            _forget_failures_before_progress(session, job)
            job.failures += 1
            again = error["code"] in job.retry_on and job.failures < job.max_attempts
            state = wished(job, State.QUEUED if again else State.FAILED)
            delay = failures.backoff(job.backoff_seconds, job.failures)
            counters.add(database, session, "attempt_failures", error["code"], 1)
        end_attempt(session, job, outcome.kind, error, outcome.exit_code, state, delay)
        leave(database, settings, session, job, state, delay, error)
    return state


def lose(database: Database, settings: Settings, session: Session, job: Job) -> State:
    """running → queued | failed | cancelled | paused, because its worker was not heard of in time.

    That spends no attempt of the training's. Only a job that loses its workers again and again without getting on, and
    so may be what takes them down, is given up after settings.max_losses.
    """
    _charge(session, job, min(clock(session), job.lease_expires_at or 0.0))
    _forget_failures_before_progress(session, job)
    job.losses += 1
    error = LOST | {"losses": job.losses}
    state = wished(job, State.QUEUED if job.losses < settings.max_losses else State.FAILED)
    # The first loss is nobody's fault: the job goes on at once.
    delay = failures.backoff(job.backoff_seconds, job.losses - 1) if job.losses > 1 else 0.0
    end_attempt(session, job, "lost", error, None, state, delay)
    # The lost worker may wake up: a new fence now, not only at the next claim, makes its writes void.
    job.fence += 1
    # In the order of `finish`: two transactions that count the same things must not wait for each other.
    counters.add(database, session, "attempt_failures", "infrastructure", 1)
    counters.add(database, session, "leases_expired", "", 1)
    leave(database, settings, session, job, state, delay, error)
    return state


# ------------------------------------------------------------------------------------- for the modules beside this one


def wished(job: Job, otherwise: State) -> State:
    """Where a job goes that did not succeed: where its user wants it, if anywhere."""
    if job.cancel_requested_at is not None:
        return State.CANCELLED
    if job.pause_requested_at is not None and otherwise == State.QUEUED:
        return State.PAUSED
    return otherwise


def leave(
    database: Database,
    settings: Settings,
    session: Session,
    job: Job,
    state: State,
    delay: float,
    error: dict[str, Any] | None,
) -> None:
    """running → `state`, by whoever may decide it."""
    at = clock(session)
    job.state, job.lease_expires_at, job.worker, job.charged_until = state, None, None, None
    job.error = error if state in (State.FAILED, State.QUEUED, State.PAUSED) else None
    job.preempt_requested_at = None
    if state in (State.QUEUED, State.PAUSED):
        job.pause_requested_at = None
    if state == State.QUEUED:
        job.queued_at, job.not_before = at, at + delay
        announce_later(session, job.id, delay)
    if state in TERMINAL:
        job.finished_at = at
        counters.add(database, session, "jobs_finished", state, 1)
        counters.observe(database, session, counters.DURATION, at - (job.started_at or at))
        results.attach(session, job)
        webhooks.tell(session, settings, job)
    add_event(session, job, state, job.step, {"error": error} if error else {})
    _announce_next_of_owner(session, job)


def end_attempt(
    session: Session,
    job: Job,
    outcome: str,
    error: dict[str, Any] | None,
    exit_code: int | None,
    state: State,
    delay: float,
) -> None:
    """The attempt of the job's fence is over; `state` is what the job becomes, in `delay` seconds if that is queued."""
    retry_at = clock(session) + delay if state == State.QUEUED and outcome in ("failed", "lost") else None
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job.id, Attempt.fence == job.fence, Attempt.ended_at.is_(None))
        .values(ended_at=now(), outcome=outcome, error=error, exit_code=exit_code, retry_at=retry_at)
    )


def locked(session: Session, lease: Lease) -> Job:
    """The job, held until the transaction ends, if the lease still stands. Raises LeaseLost."""
    return _standing(session.scalar(select(Job).where(Job.id == lease.job_id).with_for_update()), lease)


def _standing(job: Job | None, lease: Lease) -> Job:
    if job is None or job.fence != lease.fence or job.state != State.RUNNING:
        raise LeaseLost(lease.job_id, lease.fence)
    return job


def _wishes(session: Session, job: Job) -> Wishes:
    started_from = select(Job.base_step).where(Job.base_run == job.id, Job.state.not_in(TERMINAL))
    return Wishes(
        cancel=job.cancel_requested_at is not None,
        pause=job.pause_requested_at is not None,
        preempt=job.preempt_requested_at is not None,
        held=frozenset(step for step in session.scalars(started_from) if step is not None),
    )


def _announce_next_of_owner(session: Session, job: Job) -> None:
    """Jobs that waited for their owner to have fewer running had their announcements long ago."""
    key = session.get(ApiKey, job.owner)
    if key is None or key.max_running is None:
        return
    queued = select(Job.id, Job.device, Job.devices).where(
        Job.owner == job.owner, Job.state == State.QUEUED, Job.not_before <= now(), Job.id != job.id
    )
    first: dict[tuple[str, int], str] = {}
    for other, device, devices in session.execute(queued.order_by(Job.priority.desc(), Job.queued_at)):
        first.setdefault((device, devices), other)
    # One of each size: whether a worker for it is there is not known here.
    for other in first.values():
        announce_later(session, other, 0.0)


def _charge(session: Session, job: Job, at: float) -> ApiKey | None:
    """Account for the device time since the last call; the owner's key, where there is one."""
    key = keys.held(session, job.owner)
    seconds = max(0.0, at - (job.charged_until or at)) * job.devices
    job.charged_until = at
    job.device_seconds += seconds
    if key is not None:
        key.device_seconds += seconds
    return key


def _forget_failures_before_progress(session: Session, job: Job) -> None:
    """Failures count in a row: those before the newest checkpoint are over."""
    newest = session.scalar(select(func.max(CheckpointRow.step)).where(CheckpointRow.job_id == job.id)) or 0
    if newest > job.failed_step:
        job.failures = job.losses = 0
        job.failed_step = newest
