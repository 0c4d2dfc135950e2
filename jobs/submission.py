"""Jobs come into being: a row, its announcement and its first event, in one commit."""

import hashlib
import json
import secrets
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from jobs import keys
from jobs.database import Database, clock
from jobs.errors import IdempotencyReused
from jobs.journal import add_event, announce_later
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import Job
from trainer.errors import SpecError


@dataclass(frozen=True)
class Trail:
    """By what the job's logs and traces can be found again: the request that submitted it, and its trace (W3C)."""

    request_id: str | None = None
    traceparent: str | None = None


_NO_TRAIL = Trail()


def earlier(database: Database, request: JobRequest, owner: str, idempotency_key: str) -> Job | None:
    """The job that the owner made with this key before. Raises IdempotencyReused where that one was another request."""
    query = select(Job).where(Job.owner == owner, Job.idempotency_key == idempotency_key)
    with database.reading() as session:
        found = session.scalar(query)
    if found is not None and found.request_hash != _hash(request):
        raise IdempotencyReused(idempotency_key, found.id)
    return found


def create(
    database: Database,
    settings: Settings,
    request: JobRequest,
    owner: str = "",
    idempotency_key: str | None = None,
    trail: Trail = _NO_TRAIL,
) -> Job:
    """∅ → queued. The job and its announcement in one commit; nothing is published yet.

    With a key it is made once: the answer is the `earlier` one, if somebody was quicker. Raises QuotaExceeded, and
    SpecError for a job that is larger than the installation takes.
    """
    try:
        return _create(database, settings, request, owner, idempotency_key, trail)
    except IntegrityError:
        found = earlier(database, request, owner, idempotency_key) if idempotency_key is not None else None
        if found is None:
            raise
        return found


def _create(
    database: Database, settings: Settings, request: JobRequest, owner: str, idempotency_key: str | None, trail: Trail
) -> Job:
    spec = request.spec()
    job_id = f"job-{secrets.token_hex(10)}"
    retry = request.retry
    wanted, most = spec.resources.processes, settings.largest_job
    if most is not None and wanted > most:
        raise SpecError(f"resources.processes: {wanted} devices, but jobs here may have {most}; use at most that")
    with database.transaction() as session:
        keys.check_quotas(session, owner)
        at = clock(session)
        assert spec.optimisation.steps is not None
        job = Job(
            id=job_id,
            owner=owner,
            idempotency_key=idempotency_key,
            request_hash=_hash(request) if idempotency_key is not None else None,
            request_id=trail.request_id,
            traceparent=trail.traceparent,
            name=request.name,
            user_metadata=request.metadata,
            spec=spec.model_dump(mode="json"),
            method=spec.method.name,
            state=State.QUEUED,
            priority=request.priority,
            device=spec.resources.device,
            devices=spec.resources.processes,
            created_at=at,
            queued_at=at,
            max_attempts=retry.max_attempts or settings.max_attempts,
            retry_on=list(retry.on),
            backoff_seconds=settings.backoff_seconds if retry.backoff_seconds is None else retry.backoff_seconds,
            losses=0,
            failed_step=0,
            device_seconds=0.0,
            storage_bytes=0,
            steps=spec.optimisation.steps,
            figures={},
            run_directory=str(settings.runs / job_id),
            task=spec.task,
        )
        session.add(job)
        session.flush()
        announce_later(session, job_id, 0.0)
        add_event(session, job_id, "queued", None, {})
    return job


def _hash(request: JobRequest) -> str:
    """Of everything that was asked for, defaults filled in: the same wish in other words has the same."""
    return hashlib.sha256(json.dumps(request.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
