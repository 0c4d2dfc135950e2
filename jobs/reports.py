"""What a trainer reports, into the tables: under its lease, each line once."""

from typing import Any

from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from jobs.database import Database
from jobs.journal import add_event
from jobs.lease import Lease, locked
from jobs.tables import CheckpointRow, Evaluation, Job, JobEvent, Point, StoredFile
from trainer import events


def events_offset(database: Database, lease: Lease, size: int) -> int:
    """Bytes of events.jsonl, which has `size`, that are stored already. Raises LeaseLost.

    Where the file is shorter than what was read of it, a power cut has taken its end. What that said of steps is
    said again by the attempt that makes them again, in the file's new end: that is not to be passed over.
    """
    with database.transaction() as session:
        job = locked(session, lease)
        job.events_offset = min(job.events_offset, size)
        return job.events_offset


def record(database: Database, lease: Lease, found: list[tuple[int, events.Event]], offset: int) -> None:
    """Store events, each given with its offset in events.jsonl, and that the file has been read up to `offset`.

    One commit. What lies before the offset that is stored already is left out, so a batch may be given again after a
    commit whose answer was lost. Raises LeaseLost.
    """
    with database.transaction() as session:
        job = locked(session, lease)
        figures = dict(job.figures)
        points: list[dict[str, Any]] = []
        for end, event in found:
            if end > job.events_offset:
                if isinstance(event, events.Started):
                    # What it undoes has to be there.
                    _store_points(database, session, job, points)
                _apply(database, session, job, event, figures, points)
        _store_points(database, session, job, points)
        job.figures = figures
        job.events_offset = max(offset, job.events_offset)


def _apply(
    database: Database,
    session: Session,
    job: Job,
    event: events.Event,
    figures: dict[str, Any],
    points: list[dict[str, Any]],
) -> None:
    """`figures` and `points` are changed in place: they are stored once for all events."""
    values = event.model_dump(exclude={"type"})
    match event:
        case events.Started():
            # Whatever an earlier attempt did behind the checkpoint that this one starts from never happened.
            for table in (Point, Evaluation, CheckpointRow):
                session.execute(delete(table).where(table.job_id == job.id, table.step > event.step))
            undone = update(JobEvent).where(JobEvent.job_id == job.id, JobEvent.reached > event.step)
            session.execute(undone.values(reached=event.step))
            job.step = event.step
            # Progress is what gets beyond here, also where an earlier attempt had got further.
            job.failed_step = min(job.failed_step, event.step)
            figures.pop("preparing", None)
            kept = ("optimizer_state_bytes", "full_adamw_state_bytes", "device", "parameters", "tokens_per_step")
            figures |= {key: values[key] for key in kept}
        case events.Step():
            points.append(values)
            job.step = event.step
            _add_step(figures, event)
        case events.Evaluated():
            _upsert(database, session, Evaluation, job.id, values)
            figures |= {"evaluation_loss": event.loss, "perplexity": event.perplexity} | event.metrics
            if event.accuracy is not None:
                figures["evaluation_accuracy"] = event.accuracy
        case events.Prepared():
            figures |= {"examples": event.examples, "held_out": event.held_out} | {
                "trained_tokens_per_epoch": event.trained_tokens
            }
            _tell_file(session, job, values)
        case events.Checkpointed():
            _upsert(database, session, CheckpointRow, job.id, values)
        case events.Spiked():
            figures["spikes"] = figures.get("spikes", 0) + 1
        case events.RolledBack():
            figures["rollbacks"] = figures.get("rollbacks", 0) + 1
            figures["rate_scale"] = event.rate_scale
        case events.Preparing():
            figures["preparing"] = event.what
    # Steps are points; news of how far a preparation has got is of no use afterwards.
    if not isinstance(event, events.Step) and values.get("done") is None:
        add_event(session, job, event.type, event.step, {k: v for k, v in values.items() if k not in ("at", "step")})


def _tell_file(session: Session, job: Job, values: dict[str, Any]) -> None:
    """How many tokens its training file has, by the tokeniser of the job that used it last."""
    file = session.get(StoredFile, job.tuning["training_file"], with_for_update=True) if job.tuning else None
    if file is not None:
        counted = {key: value for key, value in values.items() if key not in ("at", "step")}
        tokens = {"tokenizer": job.spec["tokenizer"], "sequence_length": job.spec["dataset"]["sequence_length"]}
        file.statistics = file.statistics | {"tokens": tokens | counted}


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


def _store_points(database: Database, session: Session, job: Job, points: list[dict[str, Any]]) -> None:
    """All at once: a statement for each would let a worker store a thousand a second at most. Empties `points`."""
    if points:
        table = Point.__table__
        statement = database.insert(table)
        new = {name: statement.excluded[name] for name in points[0]}
        statement = statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=new)
        session.connection().execute(statement, [{"job_id": job.id} | point for point in points])
        points.clear()


def _upsert(database: Database, session: Session, table: Any, job_id: str, values: dict[str, Any]) -> None:
    statement = database.insert(table).values(job_id=job_id, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=values))
