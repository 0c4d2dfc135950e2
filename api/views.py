"""What the API answers with, as types: they are its documentation. Times are Unix seconds, sizes are bytes."""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from jobs.states import TERMINAL, State
from jobs.tables import Attempt, Job
from trainer.config import TrainingSpec

Item = TypeVar("Item")


class Progress(BaseModel):
    step: int
    steps: int
    ratio: float = Field(description="0 to 1")
    eta_seconds: float | None = Field(description="to the end of training; null unless running and past its first step")
    doing: str | None = Field(default=None, description="what happens before the first step")


class AttemptView(BaseModel):
    number: int
    worker: str
    started_at: float
    ended_at: float | None
    outcome: str | None = Field(description="succeeded, failed, stopped, lost; null while it runs")
    error: dict[str, Any] | None
    exit_code: int | None = Field(description="negative: the signal that ended the trainer")

    @staticmethod
    def of(attempt: Attempt) -> "AttemptView":
        return AttemptView(
            number=attempt.fence,
            worker=attempt.worker,
            started_at=attempt.started_at,
            ended_at=attempt.ended_at,
            outcome=attempt.outcome,
            error=attempt.error,
            exit_code=attempt.exit_code,
        )


class JobView(BaseModel):
    """A job: what it is, where it stands, and every setting as it was resolved."""

    object: Literal["job"] = "job"
    id: str
    name: str | None
    metadata: dict[str, str]
    state: State
    method: str
    created_at: float
    started_at: float | None
    finished_at: float | None
    cancel_requested_at: float | None
    pause_requested_at: float | None
    progress: Progress
    figures: dict[str, Any] = Field(description="the latest loss, perplexity, tokens_per_second, memory …")
    error: dict[str, Any] | None = Field(description="why it failed, or why its last attempt did: code, message, log")
    run_directory: str
    spec: TrainingSpec

    @staticmethod
    def of(job: Job) -> "JobView":
        return JobView(
            id=job.id,
            name=job.name,
            metadata=job.user_metadata,
            state=State(job.state),
            method=job.method,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            cancel_requested_at=job.cancel_requested_at,
            pause_requested_at=job.pause_requested_at,
            progress=_progress(job),
            figures={k: v for k, v in job.figures.items() if k != "preparing"},
            error=job.error,
            run_directory=job.run_directory,
            spec=TrainingSpec.model_validate(job.spec),
        )


class JobDetail(JobView):
    """A job with its attempts."""

    attempts: list[AttemptView]


def _progress(job: Job) -> Progress:
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


class MethodView(BaseModel):
    name: str
    summary: str
    paper: str
    default_learning_rate: float
    json_schema: dict[str, Any]
