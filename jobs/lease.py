"""The right to run a job, and everything that is written under it.

A claim bumps the job's fence; (job, fence) is the lease. Every write names both and takes effect only while the fence
stands and the job is running, so a worker that was thought lost and wakes up again changes nothing.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from jobs.database import Database, now
from jobs.errors import LeaseLost
from jobs.settings import Settings
from jobs.states import State
from jobs.store import add_event, announce_later, clock
from jobs.tables import Attempt, CheckpointRow, Counter, Evaluation, Job, Point
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
    """How an attempt ended: `succeeded`, `stopped` (on request, with a checkpoint) or `failed`."""

    kind: str
    exit_code: int | None = None
    error: dict[str, Any] | None = None
    retryable: bool = False


def claim(database: Database, settings: Settings, job_id: str, worker: str) -> Lease | None:
    """queued → running, or running with an expired lease → running. None where neither holds: somebody else has it."""
    with database.transaction() as session:
        lost = session.scalar(
            select(Job.fence).where(Job.id == job_id, Job.state == State.RUNNING, Job.lease_expires_at < now())
        )
        claimed = (
            update(Job)
            .where(
                Job.id == job_id,
                or_(Job.state == State.QUEUED, (Job.state == State.RUNNING) & (Job.lease_expires_at < now())),
                Job.not_before <= now(),
                Job.cancel_requested_at.is_(None),
            )
            .values(
                state=State.RUNNING,
                fence=Job.fence + 1,
                worker=worker,
                lease_expires_at=now() + settings.lease_seconds,
                error=None,
            )
            .returning(Job.fence)
        )
        fence = session.execute(claimed).scalar_one_or_none()
        if fence is None:
            return None
        session.execute(update(Job).where(Job.id == job_id, Job.started_at.is_(None)).values(started_at=now()))
        if lost is not None:
            end_attempt(session, job_id, lost, "lost", None, None)
            count(session, "leases_expired", "", 1)
        at = clock(session)
        session.add(Attempt(job_id=job_id, fence=fence, worker=worker, started_at=at))
        add_event(session, job_id, "claimed", None, {"worker": worker, "attempt": fence})
    return Lease(job_id, fence)


def beat(database: Database, settings: Settings, lease: Lease) -> Wishes:
    """Renew the lease, and see what users want. Raises LeaseLost."""
    with database.transaction() as session:
        renewed = (
            _own(lease)
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


def record(database: Database, lease: Lease, found: list[events.Event], offset: int) -> None:
    """Store events of the run, and that events.jsonl has been read up to `offset`; in one commit. Raises LeaseLost."""
    with database.transaction() as session:
        job = session.scalar(select(Job).where(Job.id == lease.job_id).with_for_update())
        if job is None or job.fence != lease.fence or job.state != State.RUNNING:
            raise LeaseLost(lease.job_id, lease.fence)
        figures = dict(job.figures)
        for event in found:
            _apply(database, session, job, event, figures)
        job.figures = figures
        job.events_offset = offset


def finish(database: Database, settings: Settings, lease: Lease, outcome: Outcome) -> State:
    """running → succeeded | failed | queued | cancelled | paused; which, is decided here alone. Raises LeaseLost.

    Stopped without anybody's wish means that the worker is shutting down: the job goes back to the queue and loses no
    attempt.
    """
    with database.transaction() as session:
        job = session.scalar(select(Job).where(Job.id == lease.job_id).with_for_update())
        if job is None or job.fence != lease.fence or job.state != State.RUNNING:
            raise LeaseLost(lease.job_id, lease.fence)
        failures = job.failures + (outcome.kind == "failed")
        delay = 0.0
        if outcome.kind == "succeeded":
            state = State.SUCCEEDED
        elif job.cancel_requested_at is not None:
            state = State.CANCELLED
        elif outcome.kind == "stopped":
            state = State.PAUSED if job.pause_requested_at is not None else State.QUEUED
        elif outcome.retryable and failures < job.max_attempts:
            state, delay = State.QUEUED, settings.backoff_seconds * 2 ** (failures - 1)
        else:
            state = State.FAILED
        leave(session, job, state, delay, failures, outcome.error)
        end_attempt(session, job.id, lease.fence, outcome.kind, outcome.error, outcome.exit_code)
        if outcome.kind == "failed":
            count(session, "attempt_failures", (outcome.error or {}).get("code", "unknown"), 1)
    return state


# ------------------------------------------------------------------------------------- for the modules beside this one


def leave(session: Session, job: Job, state: State, delay: float, failures: int, error: dict[str, Any] | None) -> None:
    """running → `state`, by whoever may decide it."""
    at = clock(session)
    job.state, job.failures, job.lease_expires_at, job.worker = state, failures, None, None
    job.error = error if state in (State.FAILED, State.QUEUED) else None
    if state in (State.QUEUED, State.PAUSED):
        job.pause_requested_at = None
    if state == State.QUEUED:
        job.queued_at, job.not_before = at, at + delay
        announce_later(session, job.id, delay)
    if state in (State.SUCCEEDED, State.FAILED, State.CANCELLED):
        job.finished_at = at
        count(session, "jobs_finished", state, 1)
        count(session, "job_duration_seconds", job.method, at - (job.started_at or at))
    add_event(session, job.id, state, job.step, {"error": error} if error else {})


def end_attempt(
    session: Session, job_id: str, fence: int, outcome: str, error: dict[str, Any] | None, exit_code: int | None
) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.fence == fence, Attempt.ended_at.is_(None))
        .values(ended_at=now(), outcome=outcome, error=error, exit_code=exit_code)
    )


def count(session: Session, name: str, label: str, amount: float) -> None:
    """Add to a total."""
    changed = session.execute(
        update(Counter).where(Counter.name == name, Counter.label == label).values(value=Counter.value + amount)
    )
    if not changed.rowcount:  # type: ignore[attr-defined]
        session.add(Counter(name=name, label=label, value=amount))
        session.flush()


def _own(lease: Lease) -> Any:
    return update(Job).where(Job.id == lease.job_id, Job.fence == lease.fence, Job.state == State.RUNNING)


_LOGGED = ("preparing", "started", "switched", "evaluated", "checkpointed", "stopped", "finished", "failed")


def _apply(database: Database, session: Session, job: Job, event: events.Event, figures: dict[str, Any]) -> None:
    values = event.model_dump(exclude={"type"})
    if isinstance(event, events.Started):
        # Whatever an earlier attempt did behind the checkpoint that this one starts from never happened.
        for table in (Point, Evaluation, CheckpointRow):
            session.execute(delete(table).where(table.job_id == job.id, table.step > event.step))
        job.step = event.step
        figures.pop("preparing", None)
        figures |= {k: values[k] for k in ("optimizer_state_bytes", "full_adamw_state_bytes", "device", "parameters")}
    elif isinstance(event, events.Step):
        _upsert(database, session, Point, job.id, values)
        job.step = event.step
        before = figures.get("seconds_per_step", event.seconds)
        projected = figures.get("projection_seconds_total", 0.0) + event.projection_seconds
        figures |= {k: v for k, v in values.items() if k not in ("at", "step", "projection_seconds", "seconds")}
        figures["seconds_per_step"] = 0.9 * before + 0.1 * event.seconds
        figures["projection_seconds_total"] = projected
        figures["step_seconds_total"] = figures.get("step_seconds_total", 0.0) + event.seconds
    elif isinstance(event, events.Evaluated):
        _upsert(database, session, Evaluation, job.id, values)
        figures |= {"evaluation_loss": event.loss, "perplexity": event.perplexity}
    elif isinstance(event, events.Checkpointed):
        _upsert(database, session, CheckpointRow, job.id, values)
    elif isinstance(event, events.Preparing):
        figures["preparing"] = event.what
    if event.type in _LOGGED and not (isinstance(event, events.Preparing) and event.done is not None):
        data = {k: v for k, v in values.items() if k not in ("at", "step")}
        add_event(session, job.id, event.type, event.step, data)


def _upsert(database: Database, session: Session, table: Any, job_id: str, values: dict[str, Any]) -> None:
    statement = database.insert(table).values(job_id=job_id, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=values))
