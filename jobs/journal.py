"""What other modules write beside a change of a job, in the same transaction: its events and announcements."""

from typing import Any

from sqlalchemy.orm import Session

from jobs.database import clock
from jobs.tables import Job, JobEvent, Outbox


def add_event(session: Session, job: Job, kind: str, step: int | None, data: dict[str, Any]) -> None:
    """Of a job as it stands: it holds the newest step that is stored."""
    session.add(JobEvent(job_id=job.id, at=clock(session), reached=job.step, type=kind, step=step, data=data))


def announce_later(session: Session, job_id: str, delay: float) -> None:
    """Into the outbox, due in `delay` seconds."""
    session.add(Outbox(job_id=job_id, due_at=clock(session) + delay))
