"""What the API answers with, as types: they are its documentation. Times are Unix seconds, sizes are bytes."""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from jobs.failures import MEANINGS, FailureClass
from jobs.states import TERMINAL, State
from jobs.tables import Attempt, Job
from jobs.workers import Seen
from trainer.config import TrainingSpec

Item = TypeVar("Item")


class Progress(BaseModel):
    step: int
    steps: int
    ratio: float = Field(description="0 to 1")
    eta_seconds: float | None = Field(description="to the end of training; null unless running and past its first step")
    doing: str | None = Field(default=None, description="what happens before the first step")


class Failure(BaseModel):
    """Why an attempt ended before its job did."""

    code: str = Field(description="its class: " + "; ".join(f"{name}: {text}" for name, text in MEANINGS.items()))
    message: str
    rank: int | None = Field(default=None, description="that failed first, where one said so")
    exit_code: int | None = None
    signal: str | None = Field(default=None, description="that ended the trainer")
    log_tail: str | None = Field(default=None, description="the end of the trainer's output")


class AttemptView(BaseModel):
    number: int
    worker: str
    started_at: float
    ended_at: float | None
    outcome: str | None = Field(description="succeeded, failed, stopped, lost; null while it runs")
    error: Failure | None
    exit_code: int | None = Field(description="negative: the signal that ended the trainer")
    retry_at: float | None = Field(description="of a failed or lost one: the job is tried again, not before; null: not")

    @staticmethod
    def of(attempt: Attempt) -> "AttemptView":
        return AttemptView(
            number=attempt.fence,
            worker=attempt.worker,
            started_at=attempt.started_at,
            ended_at=attempt.ended_at,
            outcome=attempt.outcome,
            error=_failure(attempt.error),
            exit_code=attempt.exit_code,
            retry_at=attempt.retry_at,
        )


class Retries(BaseModel):
    """What becomes of attempts that fail. Failures and losses are counted in a row: a new checkpoint ends the row."""

    max_attempts: int
    on: list[FailureClass] = Field(description="classes of failure after which the job is tried again")
    backoff_seconds: float
    failures: int = Field(description="since the last new checkpoint")
    losses: int = Field(description="of workers, likewise; they spend no attempt")


class Scheduling(BaseModel):
    """Why a queued job does not run yet."""

    unschedulable: bool = Field(description="no worker that is up could ever take it")
    reason: str


class Usage(BaseModel):
    device_seconds: float = Field(description="devices × seconds, over all attempts")
    storage_bytes: int = Field(description="of the run directory, as of a minute ago")


class JobView(BaseModel):
    """A job: what it is, where it stands, and every setting as it was resolved."""

    object: Literal["job"] = "job"
    id: str
    name: str | None
    metadata: dict[str, str]
    owner: str | None = Field(description="the id of the API key that submitted it; null without API keys")
    state: State
    priority: int
    method: str
    created_at: float
    started_at: float | None
    finished_at: float | None
    cancel_requested_at: float | None
    pause_requested_at: float | None
    progress: Progress
    figures: dict[str, Any] = Field(description="the latest loss, perplexity, tokens_per_second, memory …")
    error: Failure | None = Field(description="why it failed, or why its last attempt did")
    retry: Retries
    usage: Usage
    run_directory: str
    spec: TrainingSpec

    @staticmethod
    def of(job: Job) -> "JobView":
        return JobView(
            id=job.id,
            name=job.name,
            metadata=job.user_metadata,
            owner=job.owner or None,
            state=State(job.state),
            priority=job.priority,
            method=job.method,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            cancel_requested_at=job.cancel_requested_at,
            pause_requested_at=job.pause_requested_at,
            progress=progress_of(job),
            figures={k: v for k, v in job.figures.items() if k != "preparing"},
            error=_failure(job.error),
            retry=Retries(
                max_attempts=job.max_attempts,
                on=[name for name in MEANINGS if name in job.retry_on],
                backoff_seconds=job.backoff_seconds,
                failures=job.failures,
                losses=job.losses,
            ),
            usage=Usage(device_seconds=job.device_seconds, storage_bytes=job.storage_bytes),
            run_directory=job.run_directory,
            spec=TrainingSpec.model_validate(job.spec),
        )


class JobDetail(JobView):
    """A job with its attempts."""

    attempts: list[AttemptView]
    scheduling: Scheduling | None = Field(description="null unless it is queued")


def _failure(error: dict[str, Any] | None) -> Failure | None:
    return None if error is None else Failure.model_validate(error)


def progress_of(job: Job) -> Progress:
    per_step = job.figures.get("seconds_per_step")
    running = job.state == State.RUNNING
    return Progress(
        step=job.step,
        steps=job.steps,
        ratio=job.step / job.steps,
        eta_seconds=(job.steps - job.step) * per_step if running and per_step is not None else None,
        doing=job.figures.get("preparing") if job.state not in TERMINAL else None,
    )


class ListView(BaseModel, Generic[Item]):
    """A page. Ask for the next with after = last_id while has_more."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | int | None = None
    last_id: str | int | None = None


class EventView(BaseModel):
    object: Literal["job.event"] = "job.event"
    id: int
    at: float
    type: str
    step: int | None
    data: dict[str, Any]


class PointView(BaseModel):
    step: int
    at: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    projection_seconds: float
    tokens_per_second: float
    mfu: float | None = Field(description="model FLOPs utilisation in bf16, 0 to 1; null on unknown hardware")
    peak_device_bytes: int | None
    peak_host_bytes: int


class EvaluationView(BaseModel):
    step: int
    at: float
    loss: float
    perplexity: float
    sequences: int
    seconds: float


class MetricsView(BaseModel):
    """Training curves. Without thinning, ask for the next page with after = last_step while has_more."""

    points: list[PointView]
    evaluations: list[EvaluationView] = Field(description="all of them, on every page")
    has_more: bool
    last_step: int | None


class CheckpointView(BaseModel):
    object: Literal["job.checkpoint"] = "job.checkpoint"
    step: int
    at: float
    path: str
    bytes: int
    seconds: float
    stalled_seconds: float = Field(description="of these, how long training stood still")
    loss: float | None = Field(description="on the held-out sequences, where it was evaluated at this step")
    kept: bool = Field(description="still there: one of the newest, or the best; see checkpoints.keep and keep_best")


class LogView(BaseModel):
    text: str = Field(description="the end of the trainer's standard output and error, whole lines")


class WorkerView(BaseModel):
    object: Literal["worker"] = "worker"
    name: str
    host: str
    version: str
    device: Literal["gpu", "cpu"]
    devices: int = Field(description="GPUs, or ranks at a time on CPUs")
    gpus: list[str] = Field(description="their names, as CUDA_VISIBLE_DEVICES has them")
    state: Literal["idle", "busy", "away"]
    drained: bool = Field(description="takes no new job")
    job_id: str | None = Field(description="what it trains")
    storage_size_bytes: int | None = Field(description="of the file system with its run directories")
    storage_free_bytes: int | None
    registered_at: float
    seen_at: float

    @staticmethod
    def of(seen: Seen, with_job: bool) -> "WorkerView":
        worker = seen.worker
        return WorkerView(
            name=worker.name,
            host=worker.host,
            version=worker.version,
            device="gpu" if worker.device == "gpu" else "cpu",
            devices=worker.devices,
            gpus=worker.gpus.split(",") if worker.gpus else [],
            state="away" if not seen.up else "busy" if seen.job_id else "idle",
            drained=worker.drain_requested_at is not None,
            job_id=seen.job_id if with_job else None,
            storage_size_bytes=worker.storage_size_bytes,
            storage_free_bytes=worker.storage_free_bytes,
            registered_at=worker.registered_at,
            seen_at=worker.seen_at,
        )


class MethodView(BaseModel):
    name: str
    summary: str
    paper: str
    default_learning_rate: float
    json_schema: dict[str, Any]
