"""/v1/jobs: submit a training job, follow it, and end it."""

import logging
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Body, Query

from api.deps import Given, Services
from api.errors import ErrorAnswer
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
)
from jobs import store, upkeep
from jobs.queue import BROKER_ERRORS
from jobs.requests import JobRequest
from jobs.states import State
from jobs.tables import Job
from trainer.checkpoint.retention import kept
from trainer.config import CheckpointSpec
from trainer.preflight import preflight
from trainer.rundir import RunDir

log = logging.getLogger("stiefel.api")

router = APIRouter(
    prefix="/v1/jobs",
    tags=["jobs"],
    responses={400: {"model": ErrorAnswer}, 404: {"model": ErrorAnswer}, 409: {"model": ErrorAnswer}},
)

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


@router.post("", status_code=201)
def create_job(
    given: Given, request: Annotated[JobRequest, Body(openapi_examples=EXAMPLES)], afterwards: BackgroundTasks
) -> JobView:
    """Store a job and ring for a worker. The answer shows every setting as it was resolved."""
    if given.settings.check_files:
        preflight(request.spec())
    job = store.create(given.database, given.settings, request)
    # After the answer: what is promised stands in the database, and a broker that is away shall keep nobody waiting.
    afterwards.add_task(_announce, given, job.id)
    return JobView.of(job)


@router.get("")
def list_jobs(
    given: Given,
    state: State | None = None,
    method: str | None = None,
    after: Annotated[str | None, Query(description="id of the last job of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ListView[JobView]:
    """Newest first."""
    page = store.list_jobs(given.database, state, method, after, limit)
    jobs = [JobView.of(job) for job in page.items]
    first, last = (jobs[0].id, jobs[-1].id) if jobs else (None, None)
    return ListView[JobView](data=jobs, has_more=page.has_more, first_id=first, last_id=last)


@router.get("/{job_id}")
def get_job(given: Given, job_id: str) -> JobDetail:
    return _detail(given, store.get(given.database, job_id))


@router.get("/{job_id}/events")
def list_events(
    given: Given,
    job_id: str,
    after: Annotated[int, Query(ge=0, description="id of the last event of the page before")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ListView[EventView]:
    """What happened, oldest first; the steps themselves are under /metrics."""
    page = store.events(given.database, job_id, after, limit)
    found = [EventView(id=e.id, at=e.at, type=e.type, step=e.step, data=e.data) for e in page.items]
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return ListView[EventView](data=found, has_more=page.has_more, first_id=first, last_id=last)


@router.get("/{job_id}/metrics")
def get_metrics(
    given: Given,
    job_id: str,
    after: Annotated[int, Query(ge=0, description="only steps behind this one")] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    thin_to: Annotated[int | None, Query(ge=1, le=10_000, description="about so many points, evenly spaced")] = None,
) -> MetricsView:
    """Training curves: every step, or thinned for a plot."""
    page = store.points(given.database, job_id, after, limit, thin_to)
    evaluations = store.evaluations(given.database, job_id)
    return MetricsView(
        points=[PointView.model_validate(point, from_attributes=True) for point in page.items],
        evaluations=[EvaluationView.model_validate(row, from_attributes=True) for row in evaluations],
        has_more=page.has_more,
        last_step=page.items[-1].step if page.items else None,
    )


@router.get("/{job_id}/checkpoints")
def list_checkpoints(given: Given, job_id: str) -> ListView[CheckpointView]:
    """Newest first."""
    rows = store.checkpoints(given.database, job_id)
    wanted = CheckpointSpec.model_validate(store.get(given.database, job_id).spec["checkpoints"])
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


@router.get("/{job_id}/logs")
def get_logs(
    given: Given, job_id: str, tail: Annotated[int, Query(ge=1, le=1_000_000, description="bytes")] = 20_000
) -> LogView:
    """The end of the trainer's log. Empty before its first start."""
    return LogView(text=RunDir(store.get(given.database, job_id).run_directory).log_tail(tail))


@router.post("/{job_id}/cancel")
def cancel_job(given: Given, job_id: str) -> JobDetail:
    """Queued or paused: at once. Running: within a step, with a checkpoint. Cancelled already: nothing changes."""
    return _detail(given, store.request_cancel(given.database, job_id))


@router.post("/{job_id}/pause")
def pause_job(given: Given, job_id: str) -> JobDetail:
    """Queued: at once. Running: within a step, with a checkpoint from which resume goes on."""
    return _detail(given, store.request_pause(given.database, job_id))


@router.post("/{job_id}/resume")
def resume_job(given: Given, job_id: str, afterwards: BackgroundTasks) -> JobDetail:
    """A paused job back to the queue."""
    job = store.resume(given.database, job_id)
    afterwards.add_task(_announce, given, job_id)
    return _detail(given, job)


def _announce(given: Services, job_id: str) -> None:
    try:
        upkeep.publish_due(given.database, given.doorbell.ring, job_id)
    except BROKER_ERRORS as error:
        # The announcement stays in the outbox; the reaper publishes it when the broker is back.
        log.warning("the broker is away, %s is announced later: %s", job_id, error)


def _detail(given: Services, job: Job) -> JobDetail:
    attempts = [AttemptView.of(attempt) for attempt in store.attempts(given.database, job.id)]
    return JobDetail(**JobView.of(job).model_dump(), attempts=attempts)
