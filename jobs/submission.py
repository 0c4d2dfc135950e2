"""Jobs come into being: a row, its announcement and its first event, in one commit."""

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from jobs import files, keys, models
from jobs.database import Database, clock
from jobs.errors import FileUnknown, IdempotencyReused, Refused
from jobs.inputs import Inputs
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

# A client that has had no answer sends its request again, after ten minutes where it waits for as long as it can.
_SECONDS_OF_RETRIES = 900.0


@dataclass(frozen=True)
class Tuning:
    """What a job of /v1/fine_tuning/jobs has besides.

    `shown` becomes Job.tuning. `digest` is of the body, whose seed may be drawn anew each time. `arrived` is when the
    request came, by the database's clock, and `again` whether its client says that it has sent it before.
    """

    shown: dict[str, Any]
    digest: str
    arrived: float
    again: bool


def earlier(database: Database, digest: str, owner: str, idempotency_key: str) -> Job | None:
    """The job that the owner made with this key before. Raises IdempotencyReused where that one was another request."""
    query = select(Job).where(Job.owner == owner, Job.idempotency_key == idempotency_key)
    with database.reading() as session:
        found = session.scalar(query)
    if found is not None and found.request_hash != digest:
        raise IdempotencyReused(idempotency_key, found.id)
    return found


def sent_before(session: Session, owner: str, tuning: Tuning) -> Job | None:
    """The job that the same try of a client has made, where its first request and its second have both come through.

    The client says of the second that it is one, and it may well be the first to be done.
    """
    since = tuning.arrived - _SECONDS_OF_RETRIES if tuning.again else tuning.arrived
    query = select(Job).where(Job.owner == owner, Job.request_hash == tuning.digest, Job.created_at >= since)
    for job in session.scalars(query.order_by(Job.created_at.desc())):
        if tuning.again or (job.tuning or {}).get("again"):
            return job
    return None


def digest(request: JobRequest) -> str:
    """Of everything that was asked for, defaults filled in: the same wish in other words has the same."""
    return digest_of(request.model_dump(mode="json"))


def digest_of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def create(
    database: Database,
    settings: Settings,
    request: JobRequest,
    owner: str = "",
    idempotency_key: str | None = None,
    trail: Trail = _NO_TRAIL,
    inputs: Inputs | None = None,
    tuning: Tuning | None = None,
) -> Job:
    """∅ → queued. The job and its announcement in one commit; nothing is published yet.

    `inputs` is the request resolved, which one without uploaded files and fine-tuned models is by itself. With a key,
    or sent again by a client, it is made once: the answer is the `earlier` one, if somebody was quicker. Raises Refused
    where an input has been removed meanwhile, QuotaExceeded, and SpecError for a job that is larger than the
    installation takes.
    """
    inputs = inputs or Inputs(request.spec())
    try:
        return _create(database, settings, request, owner, idempotency_key, trail, inputs, tuning)
    except IntegrityError:
        asked = tuning.digest if tuning else digest(request)
        found = earlier(database, asked, owner, idempotency_key) if idempotency_key is not None else None
        if found is None:
            raise
        return found


def _create(
    database: Database,
    settings: Settings,
    request: JobRequest,
    owner: str,
    idempotency_key: str | None,
    trail: Trail,
    inputs: Inputs,
    tuning: Tuning | None,
) -> Job:
    spec = inputs.spec
    job_id = f"job-{secrets.token_hex(10)}"
    retry = request.retry
    wanted, most = spec.resources.processes, settings.largest_job
    if most is not None and wanted > most:
        raise SpecError(f"resources.processes: {wanted} devices, but jobs here may have {most}; use at most that")
    with database.transaction() as session:
        _check_base(session, inputs)
        # Of a request and its repetition one sees the other, and what is there already takes no more of a quota.
        keys.held(session, owner)
        if tuning is not None and idempotency_key is None:
            # Without API keys there is no row of an owner to hold.
            database.alone(session, f"repetitions of {owner} {tuning.digest}")
            if found := sent_before(session, owner, tuning):
                return found
        keys.check_quotas(session, owner)
        at = clock(session)
        asked = tuning.digest if tuning else digest(request) if idempotency_key is not None else None
        assert spec.optimisation.steps is not None
        job = Job(
            id=job_id,
            owner=owner,
            idempotency_key=idempotency_key,
            request_hash=asked,
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
            tuning=tuning.shown | {"again": tuning.again} if tuning else None,
            base_run=inputs.base[0] if inputs.base else None,
            base_step=inputs.base[1] if inputs.base else None,
        )
        session.add(job)
        session.flush()
        try:
            files.need(session, job_id, inputs.files, None)
        except FileUnknown as error:
            raise Refused("dataset.files", f"{error}: it has been deleted meanwhile", "invalid_file") from error
        announce_later(session, job_id, 0.0)
        add_event(session, job, "queued", None, {})
    return job


def _check_base(session: Session, inputs: Inputs) -> None:
    """The model that this one starts from is there, and is not deleted before this one has its row."""
    if inputs.base is None:
        return
    job_id, step = inputs.base
    base = session.scalar(select(Job).where(Job.id == job_id).with_for_update(read=True))
    steps = models.kept_steps(session, base) if base is not None else []
    if not steps:
        raise Refused("model.hub", f"the model of {job_id} has been deleted meanwhile", "model_not_found")
    if step not in steps:
        has = ", ".join(map(str, steps))
        raise Refused(
            "model.hub", f"the checkpoint of step {step} has gone meanwhile, left are {has}", "model_not_found"
        )
