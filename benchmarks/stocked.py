"""A database as an installation has it after a while: jobs by the thousand, their curves, events and attempts."""

import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, BigInteger, ColumnElement, Select, cast, delete, insert, literal, select, text
from sqlalchemy.orm import Session

from jobs import submission
from jobs.database import Database, clock
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import Attempt, Job, JobEvent, Outbox, Point, Worker

BODY = {
    "name": "benchmark",
    "model": {"preset": "llama-60m"},
    "dataset": {"source": "python-stdlib", "sequence_length": 256},
    "method": {"name": "galore", "rank": 128},
    "optimisation": {"steps": 1_000_000, "global_batch": 512, "micro_batch": 64},
}
_SHOWN = {
    "model": "llama-60m",
    "base": "llama-60m",
    "suffix": None,
    "training_file": "file-" + 24 * "0",
    "validation_file": None,
    "seed": 0,
    "type": "supervised",
    "hyperparameters": {"n_epochs": 3, "batch_size": 512, "learning_rate_multiplier": 1.0},
    "granted": [],
    "result_files": [],
    "again": False,
}
_STEPS_BETWEEN_EVALUATIONS = 100
WORKERS = 20
_FOR_EVER = 1e6  # seconds: nobody beats for these jobs and workers


@dataclass(frozen=True)
class Stock:
    """`long` has `steps`, half of all points; it was made through /v1/fine_tuning/jobs, as every other one."""

    jobs: list[str]
    long: str
    steps: int


def stock(settings: Settings, owners: list[str], jobs: int, points: int, queued: int) -> Stock:
    """Fill the database of `settings`: jobs of the owners in turn, the newest `queued` of them wait for workers, which
    are all busy with those before."""
    database = Database(settings.url)
    request = JobRequest.model_validate(BODY)
    first = submission.create(database, settings, request)
    with database.transaction() as session:
        if database.engine.dialect.name == "postgresql":
            session.execute(text("SET LOCAL statement_timeout = 0"))
        at = clock(session)
        rows = [_row(first, number, jobs, queued, owners, at) for number in range(jobs)]
        long, each = rows[0], points // 2 // max(1, jobs - queued - 1)
        for row in rows[: jobs - queued]:
            row["step"] = each
        long["step"] = points // 2
        for begin in range(0, jobs, 1000):
            session.execute(insert(Job), rows[begin : begin + 1000])
        _curves(session, Job.id == long["id"], points // 2)
        _curves(session, Job.id != long["id"], each)
        _beside(session)
        up = {"host": "h", "gpus": "", "devices": 2, "seen_at": at + _FOR_EVER}
        session.execute(insert(Worker), [{"name": f"worker-{number}"} | up for number in range(WORKERS)])
        # The one that the others are copies of.
        for table in (JobEvent, Outbox):
            session.execute(delete(table).where(table.job_id == first.id))
        session.execute(delete(Job).where(Job.id == first.id))
    if database.engine.dialect.name == "postgresql":
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text("VACUUM ANALYZE"))  # as autovacuum does after a while
    database.close()
    return Stock([row["id"] for row in rows], long["id"], points // 2)


def _row(like: Job, number: int, jobs: int, queued: int, owners: list[str], at: float) -> dict[str, Any]:
    """By the attributes of Job; a second apart, the oldest first."""
    names = Job.__mapper__.column_attrs.keys()
    created = at - (jobs - number)
    waits, runs = number >= jobs - queued, 0 <= jobs - queued - 1 - number < WORKERS
    changed = {
        "id": f"job-{secrets.token_hex(10)}",
        "owner": owners[number % len(owners)],
        "state": State.QUEUED if waits else State.RUNNING if runs else State.SUCCEEDED,
        "worker": f"worker-{number % WORKERS}" if runs else None,
        "lease_expires_at": at + _FOR_EVER if runs else None,
        "created_at": created,
        "queued_at": created,
        "announced_at": at,
        "started_at": None if waits else created,
        "finished_at": None if waits or runs else created + 1,
        "fence": 0 if waits else 1,
        "losses": 0,
        "failures": 0,
        "not_before": 0.0,
        "events_offset": 0,
        "tuning": None if number % 2 else _SHOWN,
        "figures": {} if waits else {"loss": 3.0, "perplexity": 20.1, "tokens_per_second": 1e5, "held_out": 100},
        "step": 0,
    }
    return {name: getattr(like, name) for name in names} | changed


def _curves(session: Session, which: ColumnElement[bool], steps: int) -> None:
    """A point for each step of each job that has begun, made by the database."""
    number = _numbers(steps)
    chosen = {
        "job_id": Job.id,
        "step": number.c.step,
        "at": Job.created_at + number.c.step * 0.001,
        "loss": 3.0 + 1.0 / number.c.step,
        "learning_rate": literal(0.01),
        "gradient_norm": literal(1.0),
        "tokens": cast(number.c.step, BigInteger) * 131072,
        "seconds": literal(1.0),
        "projection_seconds": literal(0.0),
        "tokens_per_second": literal(131072.0),
        "peak_host_bytes": literal(1_000_000_000),
    }
    found = select(*(value.label(name) for name, value in chosen.items())).where(
        which, Job.state != State.QUEUED, number.c.step <= Job.step
    )
    session.execute(insert(Point).from_select(list(chosen), found))


def _numbers(most: int) -> Any:
    """1 … most."""
    numbers = select(literal(1).label("step")).cte("numbers", recursive=True)
    return numbers.union_all(select(numbers.c.step + 1).where(numbers.c.step < most))


def _beside(session: Session) -> None:
    """An attempt of each job that has begun, and its events, an evaluation every so many steps among them."""
    begun = Job.state != State.QUEUED
    claim = select(Job.id, literal(1), literal("w"), Job.started_at, Job.finished_at, literal("succeeded")).where(begun)
    columns = ["job_id", "fence", "worker", "started_at", "ended_at", "outcome"]
    session.execute(insert(Attempt).from_select(columns, claim))
    for kind in ("queued", "claimed", "started"):
        _events(session, kind, select(Job.id, Job.created_at, literal(kind), literal(0), literal(0)).where(begun))
    due = select(Point.job_id, Point.at, literal("evaluated"), Point.step, Point.step)
    _events(session, "evaluated", due.where(Point.step % _STEPS_BETWEEN_EVALUATIONS == 0).order_by(Point.at))
    _events(
        session,
        "succeeded",
        select(Job.id, Job.finished_at, literal("succeeded"), Job.step, Job.step).where(Job.finished_at.is_not(None)),
    )


def _events(session: Session, kind: str, found: Select[Any]) -> None:
    data = {"claimed": {"worker": "w", "attempt": 1}, "started": {"steps": 1000}, "evaluated": {"loss": 3.0}}
    columns = ["job_id", "at", "type", "step", "reached", "data"]
    found = found.add_columns(literal(data.get(kind, {}), JSON))
    session.execute(insert(JobEvent).from_select(columns, found))
