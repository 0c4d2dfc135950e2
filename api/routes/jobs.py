"""/v1/jobs: submit a training job, follow it, and end it."""

import logging
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Body, Depends, Header, Query, Request, Response

from api.answers import documented
from api.auth import Reader, Writer
from api.deps import Given, Services
from api.views import (
    AttemptView,
    CheckpointView,
    EvaluationView,
    EventView,
    JobDetail,
    JobView,
    ListView,
    LogView,
    MetricsView,
    PointView,
    Scheduling,
)
from jobs import access, inputs, schedule, store, submission, upkeep, wishes
from jobs.queue import BROKER_ERRORS
from jobs.requests import JobRequest
from jobs.states import State
from jobs.tables import Job
from trainer import tracing
from trainer.checkpoint.retention import kept
from trainer.config import CheckpointSpec
from trainer.preflight import preflight
from trainer.rundir import RunDir

log = logging.getLogger("stiefel.api")

router = APIRouter(
    prefix="/v1/jobs",
    tags=["jobs"],
    responses=documented(401, 403, 413, 429, 503),
)

IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$", description="of your making, one a job"),
]


def _visible(given: Given, caller: Reader, job_id: str) -> Job:
    return store.get(given.database, job_id, caller.sees)


def _changeable(given: Given, caller: Writer, job_id: str) -> Job:
    return store.get(given.database, job_id, caller.sees)


# The job that a path names: somebody else's is not there.
VisibleJob = Annotated[Job, Depends(_visible)]
ChangeableJob = Annotated[Job, Depends(_changeable)]

EXAMPLES = {
    "galore": {
        "summary": "Pre-train a small LLaMA with GaLore on the Python standard library",
        "value": {
            "name": "first try",
            "model": {"preset": "llama-1m"},
            "dataset": {"source": "python-stdlib", "sequence_length": 128},
            "method": {"name": "galore", "rank": 32, "period": 50},
            "optimisation": {"steps": 200, "global_batch": 16, "learning_rate": 0.01},
        },
    },
    "full": {
        "summary": "Full-rank AdamW on JSON lines, two ranks, ZeRO-3 with CPU offload",
        "value": {
            "model": {"preset": "llama-60m"},
            "dataset": {"source": "jsonl", "files": ["/data/c4/*.jsonl"], "field": "text"},
            "tokenizer": "t5-base",
            "method": {"name": "full"},
            "optimisation": {"tokens": 1_310_720_000, "global_batch": 512, "micro_batch": 64, "dtype": "bf16"},
            "deepspeed": {"zero_stage": 3, "offload": "cpu"},
            "resources": {"processes": 2},
        },
    },
}


@router.post("", status_code=201, responses=documented(400, 409))
def create_job(
    given: Given,
    caller: Writer,
    request: Annotated[JobRequest, Body(openapi_examples=EXAMPLES)],
    http: Request,
    response: Response,
    afterwards: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> JobView:
    """Store a job and ring for a worker. The answer shows every setting as it was resolved.

    Sent again with the same Idempotency-Key it makes no second job: the answer is the first one, with the header
    Idempotent-Replayed.
    """
    if idempotency_key is not None:
        digest = submission.digest(request)
        earlier = submission.earlier(given.database, digest, caller.owner, idempotency_key)
        if earlier is not None:
            response.headers["idempotent-replayed"] = "true"
            return JobView.of(earlier)
    found = inputs.resolve(given.database, given.settings, caller, request)
    access.refuse(given.settings, found.spec, found.granted)
    if given.settings.check_files:
        preflight(found.spec, found.granted)
    trail = submission.Trail(http.state.request_id, tracing.traceparent())
    job = submission.create(given.database, given.settings, request, caller.owner, idempotency_key, trail, inputs=found)
    log.info("a job is queued", extra={"job_id": job.id})
    # After the answer: what is promised stands in the database, and a broker that is away shall keep nobody waiting.
    afterwards.add_task(announce, given, job.id)
    return JobView.of(job)


@router.get("", responses=documented(400))
def list_jobs(
    given: Given,
    caller: Reader,
    state: State | None = None,
    method: str | None = None,
    after: Annotated[str | None, Query(description="id of the last job of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ListView[JobView]:
    """Newest first: the caller's, or everybody's for an administrator."""
    page = store.list_jobs(given.database, caller.sees, state, method, after, limit)
    jobs = [JobView.of(job) for job in page.items]
    first, last = (jobs[0].id, jobs[-1].id) if jobs else (None, None)
    return ListView[JobView](data=jobs, has_more=page.has_more, first_id=first, last_id=last)


@router.get("/{job_id}", responses=documented(404))
def get_job(given: Given, job: VisibleJob) -> JobDetail:
    return _detail(given, job)


@router.delete("/{job_id}", status_code=204, responses=documented(404, 409))
def delete_job(given: Given, job: ChangeableJob) -> None:
    """Remove a job that has ended, with its run directory: curves, events, logs, checkpoints. What it wrote to an
    object store stays there."""
    wishes.remove(given.database, job.id)


@router.get("/{job_id}/events", responses=documented(400, 404))
def list_events(
    given: Given,
    job: VisibleJob,
    after: Annotated[int, Query(ge=0, le=2**63 - 1, description="id of the last event of the page before")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ListView[EventView]:
    """What happened, oldest first; the steps themselves are under /metrics."""
    page = store.events(given.database, job.id, after, limit)
    found = [EventView(id=e.id, at=e.at, type=e.type, step=e.step, data=e.data) for e in page.items]
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return ListView[EventView](data=found, has_more=page.has_more, first_id=first, last_id=last)


@router.get("/{job_id}/metrics", responses=documented(400, 404))
def get_metrics(
    given: Given,
    job: VisibleJob,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="only steps behind this one")] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    thin_to: Annotated[int | None, Query(ge=1, le=10_000, description="about so many points, evenly spaced")] = None,
) -> MetricsView:
    """Training curves: every step, or thinned for a plot."""
    page = store.points(given.database, job.id, after, limit, thin_to)
    evaluations = store.evaluations(given.database, job.id)
    return MetricsView(
        points=[PointView.model_validate(point, from_attributes=True) for point in page.items],
        evaluations=[EvaluationView.model_validate(row, from_attributes=True) for row in evaluations],
        has_more=page.has_more,
        last_step=page.items[-1].step if page.items else None,
    )


@router.get("/{job_id}/checkpoints", responses=documented(404))
def list_checkpoints(given: Given, job: VisibleJob) -> ListView[CheckpointView]:
    """Newest first."""
    rows = store.checkpoints(given.database, job.id)
    wanted = CheckpointSpec.model_validate(job.spec["checkpoints"])
    steps = kept({row.step: row.loss for row in rows}, wanted)
    found = [
        CheckpointView(
            step=row.step,
            at=row.at,
            path=row.path,
            bytes=row.bytes,
            seconds=row.seconds,
            stalled_seconds=row.stalled_seconds,
            loss=row.loss,
            kept=row.step in steps,
        )
        for row in rows
    ]
    return ListView[CheckpointView](data=found, has_more=False)


@router.get("/{job_id}/logs", responses=documented(400, 404))
def get_logs(job: VisibleJob, tail: Annotated[int, Query(ge=1, le=1_000_000, description="bytes")] = 20_000) -> LogView:
    """The end of the trainer's log. Empty before its first start."""
    return LogView(text=RunDir(job.run_directory).log_tail(tail))


@router.post("/{job_id}/cancel", responses=documented(404, 409))
def cancel_job(given: Given, job: ChangeableJob) -> JobDetail:
    """Queued or paused: at once. Running: within a step, with a checkpoint. Cancelled already: nothing changes."""
    return _detail(given, wishes.cancel(given.database, given.settings, job.id))


@router.post("/{job_id}/pause", responses=documented(404, 409))
def pause_job(given: Given, job: ChangeableJob) -> JobDetail:
    """Queued: at once. Running: within a step, with a checkpoint from which resume goes on."""
    return _detail(given, wishes.pause(given.database, job.id))


@router.post("/{job_id}/resume", responses=documented(404, 409))
def resume_job(given: Given, job: ChangeableJob, afterwards: BackgroundTasks) -> JobDetail:
    """A paused job back to the queue."""
    job = wishes.resume(given.database, job.id)
    afterwards.add_task(announce, given, job.id)
    return _detail(given, job)


def announce(given: Services, job_id: str) -> None:
    try:
        upkeep.publish_due(given.database, given.settings, given.doorbell.ring, job_id)
    except BROKER_ERRORS as error:
        # The announcement stays in the outbox; the reaper publishes it when the broker is back.
        log.warning("the broker is away, %s is announced later: %s", job_id, error)


def _detail(given: Services, job: Job) -> JobDetail:
    attempts = [AttemptView.of(attempt) for attempt in store.attempts(given.database, job.id)]
    waiting = schedule.waiting(given.database, given.settings, job)
    scheduling = Scheduling(unschedulable=waiting.unschedulable, reason=waiting.reason) if waiting else None
    return JobDetail(**JobView.of(job).model_dump(), attempts=attempts, scheduling=scheduling)
