"""The right to run a job, and everything that is written under it.

A claim bumps the job's fence; (job, fence) is the lease. Every write names both and takes effect only while the fence
stands and the job is running, so a worker that was thought lost and wakes up again changes nothing.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from jobs import counters
from jobs.database import Database, now
from jobs.errors import LeaseLost
from jobs.settings import Settings
from jobs.states import State
from jobs.store import add_event, announce_later, clock
from jobs.tables import Attempt, CheckpointRow, Evaluation, Job, Point
from trainer import events


@dataclass(frozen=True)
class Lease:
    job_id: str
    fence: int


@dataclass(frozen=True)
class Wishes:
    """What users want of a running job."""

    cancel: bool
    pause: bool


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `succeeded`, `stopped` (because it was asked to) or `failed`."""

    kind: str
    exit_code: int | None = None
    error: dict[str, Any] | None = None
    retryable: bool = False


def claim(database: Database, settings: Settings, job_id: str, worker: str) -> Lease | None:
    """queued → running. None where the job is not queued, or still held back after a failure.

    A job whose worker was lost is not claimed over: the reaper queues it first, and counts the loss.
    """
    with database.transaction() as session:
        claimed = (
            update(Job)
            .where(Job.id == job_id, Job.state == State.QUEUED, Job.not_before <= now())
            .values(
                state=State.RUNNING,
                fence=Job.fence + 1,
                worker=worker,
                lease_expires_at=now() + settings.lease_seconds,
                error=None,
            )
            .returning(Job.fence, Job.queued_at)
        )
        row = session.execute(claimed).one_or_none()
        if row is None:
            return None
        fence, queued_at = row
        session.execute(update(Job).where(Job.id == job_id, Job.started_at.is_(None)).values(started_at=now()))
        at = clock(session)
        counters.observe(database, session, counters.QUEUE_WAIT, at - queued_at)
        session.add(Attempt(job_id=job_id, fence=fence, worker=worker, started_at=at))
        add_event(session, job_id, "claimed", None, {"worker": worker, "attempt": fence})
    return Lease(job_id, fence)


def beat(database: Database, settings: Settings, lease: Lease) -> Wishes:
    """Renew the lease, and see what users want. Raises LeaseLost."""
    with database.transaction() as session:
        renewed = (
            update(Job)
            .where(Job.id == lease.job_id, Job.fence == lease.fence, Job.state == State.RUNNING)
            .values(lease_expires_at=now() + settings.lease_seconds)
            .returning(Job.cancel_requested_at, Job.pause_requested_at)
        )
        row = session.execute(renewed).one_or_none()
    if row is None:
        raise LeaseLost(lease.job_id, lease.fence)
    return Wishes(cancel=row[0] is not None, pause=row[1] is not None)


def events_offset(database: Database, lease: Lease) -> int:
    """Bytes of events.jsonl that are stored already."""
    with database.reading() as session:
        return session.scalar(select(Job.events_offset).where(Job.id == lease.job_id)) or 0


def record(database: Database, lease: Lease, found: list[tuple[int, events.Event]], offset: int) -> None:
    """Store events, each given with its offset in events.jsonl, and that the file has been read up to `offset`.

    One commit. What lies before the offset that is stored already is left out, so a batch may be given again after a
    commit whose answer was lost. Raises LeaseLost.
    """
    with database.transaction() as session:
        job = _locked(session, lease)
        figures = dict(job.figures)
        for end, event in found:
            if end > job.events_offset:
                _apply(database, session, job, event, figures)
        job.figures = figures
        job.events_offset = max(offset, job.events_offset)


def finish(database: Database, settings: Settings, lease: Lease, outcome: Outcome) -> State:
    """running → succeeded | failed | queued | cancelled | paused; which, is decided here alone. Raises LeaseLost.

    Stopped without anybody's wish means that the worker is shutting down: the job goes back to the queue and loses no
    attempt.
    """
    with database.transaction() as session:
        job = _locked(session, lease)
        failures = job.failures + (outcome.kind == "failed")
        delay = 0.0
        if outcome.kind == "succeeded":
            state = State.SUCCEEDED
        elif outcome.kind == "stopped":
            state = wished(job, State.QUEUED)
        elif outcome.retryable and failures < job.max_attempts:
            state, delay = wished(job, State.QUEUED), settings.backoff_seconds * 2 ** (failures - 1)
        else:
            state = wished(job, State.FAILED)
        leave(database, session, job, state, delay, failures, outcome.error)
        end_attempt(session, job.id, lease.fence, outcome.kind, outcome.error, outcome.exit_code)
        if outcome.kind == "failed":
            reason = (outcome.error or {}).get("code", "unknown")
            counters.add(database, session, "attempt_failures", reason, 1)
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
    session: Session,
    job: Job,
    state: State,
    delay: float,
    failures: int,
    error: dict[str, Any] | None,
) -> None:
    """running → `state`, by whoever may decide it."""
    at = clock(session)
    job.state, job.failures, job.lease_expires_at, job.worker = state, failures, None, None
    job.error = error if state in (State.FAILED, State.QUEUED, State.PAUSED) else None
    if state in (State.QUEUED, State.PAUSED):
        job.pause_requested_at = None
    if state == State.QUEUED:
        job.queued_at, job.not_before = at, at + delay
        announce_later(session, job.id, delay)
    if state in (State.SUCCEEDED, State.FAILED, State.CANCELLED):
        job.finished_at = at
        counters.add(database, session, "jobs_finished", state, 1)
        counters.observe(database, session, counters.DURATION, at - (job.started_at or at))
    add_event(session, job.id, state, job.step, {"error": error} if error else {})


def end_attempt(
    session: Session, job_id: str, fence: int, outcome: str, error: dict[str, Any] | None, exit_code: int | None
) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.fence == fence, Attempt.ended_at.is_(None))
        .values(ended_at=now(), outcome=outcome, error=error, exit_code=exit_code)
    )


def _locked(session: Session, lease: Lease) -> Job:
    """The job, held until the transaction ends, if the lease still stands. Raises LeaseLost."""
    job = session.scalar(select(Job).where(Job.id == lease.job_id).with_for_update())
    if job is None or job.fence != lease.fence or job.state != State.RUNNING:
        raise LeaseLost(lease.job_id, lease.fence)
    return job


def _apply(database: Database, session: Session, job: Job, event: events.Event, figures: dict[str, Any]) -> None:
    values = event.model_dump(exclude={"type"})
    match event:
        case events.Started():
            # Whatever an earlier attempt did behind the checkpoint that this one starts from never happened.
            for table in (Point, Evaluation, CheckpointRow):
                session.execute(delete(table).where(table.job_id == job.id, table.step > event.step))
            job.step = event.step
            figures.pop("preparing", None)
            kept = ("optimizer_state_bytes", "full_adamw_state_bytes", "device", "parameters", "tokens_per_step")
            figures |= {key: values[key] for key in kept}
        case events.Step():
            _upsert(database, session, Point, job.id, values)
            job.step = event.step
            _add_step(figures, event)
        case events.Evaluated():
            _upsert(database, session, Evaluation, job.id, values)
            figures |= {"evaluation_loss": event.loss, "perplexity": event.perplexity}
        case events.Checkpointed():
            _upsert(database, session, CheckpointRow, job.id, values)
        case events.Preparing():
            figures["preparing"] = event.what
    # Steps are points; news of how far a preparation has got is of no use afterwards.
    if not isinstance(event, events.Step) and values.get("done") is None:
        add_event(session, job.id, event.type, event.step, {k: v for k, v in values.items() if k not in ("at", "step")})


def _add_step(figures: dict[str, Any], event: events.Step) -> None:
    """The latest figures of a job, and totals over all that was ever trained, repeated steps included."""
    before = figures.get("seconds_per_step", event.seconds)
    figures |= event.model_dump(exclude={"type", "at", "step", "seconds", "projection_seconds"})
    figures["seconds_per_step"] = 0.9 * before + 0.1 * event.seconds
    totals = {
        "tokens_total": figures.get("tokens_per_step", 0),
        "projection_seconds_total": event.projection_seconds,
        "step_seconds_total": event.seconds,
    }
    for key, amount in totals.items():
        figures[key] = figures.get(key, 0) + amount


def _upsert(database: Database, session: Session, table: Any, job_id: str, values: dict[str, Any]) -> None:
    statement = database.insert(table).values(job_id=job_id, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=values))
