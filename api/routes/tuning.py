"""/v1/fine_tuning/jobs: what OpenAI's client drives, over the same jobs as /v1/jobs."""

import logging
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, BackgroundTasks, Body, Depends, Query, Request, Response

from api.answers import documented
from api.auth import Reader, Writer
from api.deps import Given, Services
from api.routes.jobs import IdempotencyKey, announce
from api.tuningviews import TuningCheckpoint, TuningEvent, TuningJob, external
from api.views import ListView
from jobs import chronicle, models, store, submission, tuning, wishes
from jobs.database import Database, clock
from jobs.errors import TuningJobNotFound, UnknownCursor, WrongState
from jobs.tables import Job, JobEvent, Point
from jobs.tuningbody import TuningBody
from trainer import tracing

log = logging.getLogger("stiefel.api")

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], responses=documented(401, 403, 413, 429, 503))

Item = TypeVar("Item", TuningJob, TuningEvent, TuningCheckpoint)
_JOB_ID = re.compile(r"ft(job-[0-9a-f]{20})")
_CHECKPOINT_ID = re.compile(r"ftckpt-([0-9a-f]{20})-([0-9]{1,18})")
_EVENT_ID = re.compile(r"ftevent-(step-)?([0-9]{1,18})")
_BODY = {"requestBody": {"content": {"application/json": {"schema": TuningBody.model_json_schema()}}}}


def _found(given: Given, caller: Reader, fine_tuning_job_id: str) -> Job:
    match = _JOB_ID.fullmatch(fine_tuning_job_id)
    job = store.find(given.database, match[1], caller.sees) if match else None
    if job is None or job.tuning is None:
        raise TuningJobNotFound(fine_tuning_job_id)
    return job


def _changeable(given: Given, caller: Writer, fine_tuning_job_id: str) -> Job:
    return _found(given, caller, fine_tuning_job_id)


VisibleJob = Annotated[Job, Depends(_found)]
ChangeableJob = Annotated[Job, Depends(_changeable)]


@router.post("", responses=documented(400, 409), openapi_extra=_BODY)
def create_tuning_job(
    given: Given,
    caller: Writer,
    body: Annotated[dict[str, Any], Body()],
    http: Request,
    response: Response,
    afterwards: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> TuningJob:
    """Queue a fine-tuning. OpenAI's body; our settings stand beside it (`extra_body`) or among the hyperparameters.

    A file that is still being checked is waited for. Sent again by a client that has had no answer
    (x-stainless-retry-count), or with the same Idempotency-Key, it makes no second job.
    """
    digest = submission.digest_of(body)
    with given.database.reading() as session:
        arrived = clock(session)
    again = http.headers.get("x-stainless-retry-count", "0") not in ("", "0")
    if idempotency_key is not None:
        earlier = submission.earlier(given.database, digest, caller.owner, idempotency_key)
        if earlier is not None and earlier.tuning is not None:
            response.headers["idempotent-replayed"] = "true"
            return TuningJob.of(earlier)
    asked = tuning.asked(given.database, given.settings, caller, body)
    with asked.names.told():
        job = submission.create(
            given.database,
            given.settings,
            asked.request,
            caller.owner,
            idempotency_key,
            submission.Trail(http.state.request_id, tracing.traceparent()),
            asked.inputs,
            submission.Tuning(asked.shown, digest, arrived, again),
        )
    if job.created_at < arrived:
        response.headers["idempotent-replayed"] = "true"
    log.info("a job is queued", extra={"job_id": job.id})
    afterwards.add_task(announce, given, job.id)
    return TuningJob.of(job)


@router.get("", responses=documented(400))
def list_tuning_jobs(
    given: Given,
    caller: Reader,
    http: Request,
    after: Annotated[str | None, Query(description="id of the last job of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ListView[TuningJob]:
    """Newest first: the caller's, or everybody's for an administrator. `metadata[KEY]=VALUE` chooses among them."""
    wanted = tuning.chosen(http.query_params)
    behind = None
    if after is not None:
        match = _JOB_ID.fullmatch(after)
        if match is None:
            raise UnknownCursor(after)
        behind = match[1]
    page = store.list_jobs(given.database, caller.sees, after=behind, limit=limit, where=wanted)
    return _page([TuningJob.of(job) for job in page.items], page.has_more)


@router.get("/{fine_tuning_job_id}", responses=documented(404))
def get_tuning_job(job: VisibleJob) -> TuningJob:
    return TuningJob.of(job)


@router.get("/{fine_tuning_job_id}/events", responses=documented(400, 404))
def list_tuning_events(
    given: Given,
    job: VisibleJob,
    after: Annotated[str | None, Query(description="id of the last event of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> ListView[TuningEvent]:
    """What happened, newest first, each step among it. The curves alone are in the result files."""
    behind: tuple[type[JobEvent] | type[Point], int] | None = None
    if after is not None:
        match = _EVENT_ID.fullmatch(after)
        if match is None:
            raise UnknownCursor(after, "event")
        behind = (Point if match[1] else JobEvent, int(match[2]))
    page = chronicle.newest(given.database, job.id, behind, limit)
    return _page([TuningEvent.of(job, one) for one in page.items], page.has_more)


@router.get("/{fine_tuning_job_id}/checkpoints", responses=documented(400, 404))
def list_tuning_checkpoints(
    given: Given,
    job: VisibleJob,
    after: Annotated[str | None, Query(description="id of the last checkpoint of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> ListView[TuningCheckpoint]:
    """Those that are kept (checkpoints.keep, keep_best), newest first."""
    with given.database.reading() as session:
        steps = models.kept_steps(session, job)
    rows = {row.step: row for row in store.checkpoints(given.database, job.id)}
    evaluations = {row.step: row for row in store.evaluations(given.database, job.id)}
    points = store.points_at(given.database, job.id, steps)
    held_out = job.figures.get("held_out")
    found = [
        TuningCheckpoint.of(job, rows[step], points.get(step), evaluations.get(step), held_out)
        for step in reversed(steps)
        if step in rows
    ]
    if after is not None:
        match = _CHECKPOINT_ID.fullmatch(after)
        if match is None or match[1] != job.id.removeprefix("job-"):
            raise UnknownCursor(after, "checkpoint")
        # It may have made room for a newer one since.
        found = [checkpoint for checkpoint in found if checkpoint.step_number < int(match[2])]
    return _page(found[:limit], len(found) > limit)


@router.post("/{fine_tuning_job_id}/cancel", responses=documented(404, 409))
def cancel_tuning_job(given: Given, job: ChangeableJob) -> TuningJob:
    """Queued or paused: at once. Running: within a step, with a checkpoint."""
    return _wished(lambda database, job_id: wishes.cancel(database, given.settings, job_id), given, job)


@router.post("/{fine_tuning_job_id}/pause", responses=documented(404, 409))
def pause_tuning_job(given: Given, job: ChangeableJob) -> TuningJob:
    """Queued: at once. Running: within a step, with a checkpoint from which resume goes on."""
    return _wished(wishes.pause, given, job)


@router.post("/{fine_tuning_job_id}/resume", responses=documented(404, 409))
def resume_tuning_job(given: Given, job: ChangeableJob, afterwards: BackgroundTasks) -> TuningJob:
    """A paused job back to the queue."""
    shown = _wished(wishes.resume, given, job)
    afterwards.add_task(announce, given, job.id)
    return shown


def _wished(wish: Callable[[Database, str], Job], given: Services, job: Job) -> TuningJob:
    try:
        return TuningJob.of(wish(given.database, job.id))
    except WrongState as error:
        # By the id that the user knows.
        raise WrongState(external(job.id), error.state, error.operation, error.needed) from error


def _page(found: list[Item], has_more: bool) -> ListView[Item]:
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return ListView[Item](data=found, has_more=has_more, first_id=first, last_id=last)
