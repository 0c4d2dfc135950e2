"""What /v1/fine_tuning answers with: OpenAI's objects, whole, and beside them what a low-rank run shows."""

import time
from typing import Any, Literal

from pydantic import BaseModel, Field

from api.views import Progress, progress_of
from jobs import models
from jobs.states import TERMINAL, State
from jobs.tables import CheckpointRow, Evaluation, Job, JobEvent, Point
from trainer.config import TrainingSpec


class TuningError(BaseModel):
    code: str
    message: str
    param: str | None


class TuningHyperparameters(BaseModel):
    """As they were resolved."""

    n_epochs: int | None = Field(description="rounded up; null for pretrain, which counts steps")
    batch_size: int = Field(description="examples, or sequences, in a step")
    learning_rate_multiplier: float = Field(description="of the method's usual rate")


class TuningJob(BaseModel):
    """OpenAI's object, and every setting as it was resolved."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    id: str
    created_at: int
    finished_at: int | None
    estimated_finish: int | None = Field(description="null unless it runs and is past its first step")
    model: str
    fine_tuned_model: str | None = Field(description="null until it has succeeded")
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    hyperparameters: TuningHyperparameters
    method: dict[str, Any]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    seed: int
    trained_tokens: int | None = Field(description="tokens that went through the model; null until it has ended")
    error: TuningError | None
    integrations: list[Any] = []
    metadata: dict[str, str]
    # Ours.
    suffix: str | None
    progress: Progress
    optimizer: dict[str, Any] = Field(description="the low-rank method")
    optimisation: dict[str, Any]
    dataset: dict[str, Any] = Field(description="without its files")
    tokenizer: str
    deepspeed: dict[str, Any]
    resources: dict[str, Any]
    checkpoints: dict[str, Any]
    guard: dict[str, Any]
    retry: dict[str, Any]
    priority: int

    @staticmethod
    def of(job: Job) -> "TuningJob":
        shown = job.tuning
        assert shown is not None
        spec = TrainingSpec.model_validate(job.spec)
        ended = job.state in TERMINAL
        hyperparameters = TuningHyperparameters.model_validate(shown["hyperparameters"])
        tokens = job.figures.get("tokens")
        return TuningJob(
            id=external(job.id),
            created_at=int(job.created_at),
            finished_at=int(job.finished_at) if ended and job.finished_at is not None else None,
            estimated_finish=_estimate(job),
            model=shown["model"],
            fine_tuned_model=models.name_of(job) if job.state == State.SUCCEEDED else None,
            organization_id=job.owner or "local",
            status=State(job.state).value,
            hyperparameters=hyperparameters,
            method={"type": shown["type"], shown["type"]: {"hyperparameters": hyperparameters.model_dump()}},
            training_file=shown["training_file"],
            validation_file=shown["validation_file"],
            result_files=shown["result_files"],
            seed=shown["seed"],
            trained_tokens=int(tokens) if ended and tokens is not None else None,
            error=_error(job),
            metadata=job.user_metadata,
            suffix=shown["suffix"],
            progress=progress_of(job),
            optimizer=spec.method.model_dump(),
            optimisation=spec.optimisation.model_dump(),
            dataset=spec.dataset.model_dump(exclude={"files", "validation_files"}),
            tokenizer=shown["model"] if spec.tokenizer == job.spec["model"].get("path") else spec.tokenizer,
            deepspeed=spec.deepspeed.model_dump(),
            resources=spec.resources.model_dump(),
            checkpoints=spec.checkpoints.model_dump(),
            guard=spec.guard.model_dump(),
            retry={"max_attempts": job.max_attempts, "on": job.retry_on, "backoff_seconds": job.backoff_seconds},
            priority=job.priority,
        )


class TuningEvent(BaseModel):
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]

    @staticmethod
    def of(job: Job, event: JobEvent | Point) -> "TuningEvent":
        if isinstance(event, Point):
            return _event_of(job, event)
        is_metric = event.type == "evaluated"
        data = {"step": event.step} | event.data
        if is_metric:
            data |= {"valid_loss": event.data.get("loss"), "valid_mean_token_accuracy": event.data.get("accuracy")}
        return TuningEvent(
            id=f"ftevent-{event.id}",
            created_at=int(event.at),
            level=_level(event),
            message=_message(event),
            type="metrics" if is_metric else "message",
            data=data,
        )


def _event_of(job: Job, point: Point) -> TuningEvent:
    return TuningEvent(
        id=f"ftevent-step-{point.step}",
        created_at=int(point.at),
        level="info",
        message=f"Step {point.step}/{job.steps}: training loss={point.loss:.4f}",
        type="metrics",
        data={
            "step": point.step,
            "total_steps": job.steps,
            "train_loss": point.loss,
            "train_mean_token_accuracy": point.accuracy,
            "learning_rate": point.learning_rate,
        },
    )


class CheckpointMetrics(BaseModel):
    """`valid_…` are of the evaluation at this step; the same as `full_valid_…` where it went through all held out."""

    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class TuningCheckpoint(BaseModel):
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    id: str
    created_at: int
    step_number: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    metrics: CheckpointMetrics

    @staticmethod
    def of(
        job: Job, row: CheckpointRow, point: Point | None, evaluation: Evaluation | None, held_out: int | None
    ) -> "TuningCheckpoint":
        loss = evaluation.loss if evaluation else row.loss
        accuracy = evaluation.accuracy if evaluation else None
        full = evaluation is not None and held_out is not None and evaluation.sequences >= held_out
        return TuningCheckpoint(
            id=checkpoint_id(job, row.step),
            created_at=int(row.at),
            step_number=row.step,
            fine_tuning_job_id=external(job.id),
            fine_tuned_model_checkpoint=models.name_of(job, row.step),
            metrics=CheckpointMetrics(
                step=row.step,
                train_loss=point.loss if point else None,
                train_mean_token_accuracy=point.accuracy if point else None,
                valid_loss=loss,
                valid_mean_token_accuracy=accuracy,
                full_valid_loss=loss if full else None,
                full_valid_mean_token_accuracy=accuracy if full else None,
            ),
        )


def external(job_id: str) -> str:
    return "ft" + job_id


def checkpoint_id(job: Job, step: int) -> str:
    return f"ftckpt-{job.id.removeprefix('job-')}-{step}"


def _estimate(job: Job) -> int | None:
    eta = progress_of(job).eta_seconds
    return None if eta is None else int(time.time() + eta)


def _error(job: Job) -> TuningError | None:
    if job.state != State.FAILED or job.error is None:
        return None
    param = "training_file" if job.error["code"] == "bad_data" else None
    return TuningError(code=job.error["code"], message=job.error["message"], param=param)


def _level(event: JobEvent) -> Literal["info", "warn", "error"]:
    if event.type == "failed":
        return "error"
    return "warn" if event.type in ("spiked", "rolled_back") or event.data.get("error") else "info"


def _message(event: JobEvent) -> str:
    data, step = event.data, event.step
    match event.type:
        case "queued" if data.get("error"):
            return f"The attempt failed and is tried again: {data['error']['message']}"
        case "queued":
            return "The job is queued"
        case "claimed":
            return f"Attempt {data['attempt']} begins"
        case "preparing":
            return f"Preparing: {data['what']}"
        case "prepared":
            return f"{data['examples']} examples are ready, {data['held_out']} held out, {data['left_out']} left out"
        case "started":
            return f"Training begins after step {step} of {data['steps']}"
        case "evaluated":
            return f"Step {step}: validation loss={data['loss']:.4f}"
        case "sampled":
            return f"Step {step}: {data['prompt']!r} → {data['text']!r}"
        case "checkpointed":
            return f"Checkpoint created at step {step}"
        case "switched":
            return f"New subspaces at step {step}"
        case "spiked":
            return f"The loss is far above what is usual: {data['loss']:.4g} at step {step}"
        case "rolled_back":
            return f"Gone back to step {step}: {data['reason']}"
        case "pause_requested" | "cancel_requested":
            return f"The job is asked to {event.type.partition('_')[0]}"
        case "finished":
            return f"Training has finished at step {step}"
        case "stopped":
            return f"Training has stopped at step {step}, with a checkpoint"
        case "failed":
            error = data.get("error") or data
            return f"Failed: {error.get('message', 'unknown')}"
        case "succeeded":
            return "The job has succeeded: the fine-tuned model can be named"
        case _:
            return f"The job is {event.type}"
