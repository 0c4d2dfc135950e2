"""The tables. Times are Unix seconds of the database's clock; ids are opaque strings."""

from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {dict[str, Any]: JSON, float: Float(53), str: Text}


class Job(Base):
    """What was asked for, where it stands, and who may write for it."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "state", "method"),
        Index(None, "created_at", "id"),
        Index(None, "owner", "created_at", "id"),
        Index(None, "state", "created_at", "id"),
        Index(None, "owner", "state"),
        Index(None, "base_run"),
        UniqueConstraint("owner", "idempotency_key"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40), server_default="")  # an API key's id; empty without API keys
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_hash: Mapped[str | None] = mapped_column(String(64))  # SHA-256 of what was asked for under that key
    request_id: Mapped[str | None] = mapped_column(String(128))  # of the request that submitted it, for logs
    traceparent: Mapped[str | None] = mapped_column(String(64))  # the trace that its attempts belong to (W3C)
    name: Mapped[str | None]
    user_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")
    spec: Mapped[dict[str, Any]]
    method: Mapped[str] = mapped_column(String(40))
    state: Mapped[str] = mapped_column(String(16))

    priority: Mapped[int] = mapped_column(server_default="0")  # higher first
    device: Mapped[str] = mapped_column(String(8), server_default="any")  # any, gpu, cpu
    devices: Mapped[int] = mapped_column(server_default="1")  # of one host

    created_at: Mapped[float]
    queued_at: Mapped[float]  # last became queued
    started_at: Mapped[float | None]  # first became running
    finished_at: Mapped[float | None]
    announced_at: Mapped[float | None]  # last published to the broker
    not_before: Mapped[float] = mapped_column(default=0.0)  # backoff: not to be claimed earlier

    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]
    preempt_requested_at: Mapped[float | None]  # a job of higher priority needs its devices

    # The lease: (id, fence) is the right to write. A new claim makes the old fence void.
    fence: Mapped[int] = mapped_column(default=0)
    lease_expires_at: Mapped[float | None]
    worker: Mapped[str | None]
    # Since the last attempt that left a new checkpoint: failures of the training, and workers that were lost.
    failures: Mapped[int] = mapped_column(default=0)
    losses: Mapped[int] = mapped_column(server_default="0")
    failed_step: Mapped[int] = mapped_column(server_default="0")  # of the newest checkpoint, when either last happened
    max_attempts: Mapped[int]
    retry_on: Mapped[list[str]] = mapped_column(JSON)  # classes of failure
    backoff_seconds: Mapped[float] = mapped_column(server_default="5")

    charged_until: Mapped[float | None]  # device time is accounted for up to here, while it runs
    device_seconds: Mapped[float] = mapped_column(server_default="0")
    storage_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")  # of the run directory, lately

    step: Mapped[int] = mapped_column(default=0)
    steps: Mapped[int]
    figures: Mapped[dict[str, Any]] = mapped_column(default=dict)  # the latest of each, for lists and Prometheus
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    events_offset: Mapped[int] = mapped_column(BigInteger, default=0)  # bytes of events.jsonl already stored
    run_directory: Mapped[str]

    task: Mapped[str] = mapped_column(String(16), server_default="pretrain")  # pretrain, finetune, classify
    # How it was asked for through /v1/fine_tuning/jobs, and what that shows besides; null for a job of /v1/jobs.
    tuning: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    results_due_at: Mapped[float | None] = mapped_column(index=True)  # of a job that has ended without its result file
    base_run: Mapped[str | None] = mapped_column(String(40))  # the job whose model this one starts from
    base_step: Mapped[int | None]  # of the checkpoint


class StoredFile(Base):
    """An uploaded file, or the results of a job. Its bytes lie where `jobs.filestore` says, under its id."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "owner", "created_at", "id"), Index(None, "expires_at"))

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40), server_default="")
    filename: Mapped[str]
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    status: Mapped[str] = mapped_column(String(16))  # uploaded, processed, error
    status_details: Mapped[str | None]
    columns: Mapped[dict[str, Any]] = mapped_column(server_default="{}")  # field → column, where they differ
    format: Mapped[str | None] = mapped_column(String(16))  # chat, prompt, text, labelled; null until it is known
    examples: Mapped[int | None]
    statistics: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    checked_until: Mapped[float | None]  # somebody is at it, until then


class JobFile(Base):
    """A file that a job needs: it is not removed before the job has ended."""

    __tablename__ = "job_files"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    file_id: Mapped[str] = mapped_column(ForeignKey("files.id"), primary_key=True, index=True)


class Webhook(Base):
    """Where an owner wants to be told of jobs that have ended."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40), server_default="", index=True)
    url: Mapped[str]
    name: Mapped[str]
    events: Mapped[list[str]] = mapped_column(JSON)  # their types
    secret: Mapped[str]  # signs; not a hash, since it has to
    old_secret: Mapped[str | None]  # signs too, until then
    old_secret_until: Mapped[float | None]
    created_at: Mapped[float]
    updated_at: Mapped[float]
    gone_at: Mapped[float | None]  # its receiver said that it is gone: nothing more is sent


class Delivery(Base):
    """One message to one webhook: written with the change it tells of, removed some time after it has arrived."""

    __tablename__ = "deliveries"
    __table_args__ = (Index(None, "webhook_id", "created_at"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)  # the same each time it is tried
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    job_id: Mapped[str] = mapped_column(String(40))  # empty: a test
    body: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    due_at: Mapped[float | None] = mapped_column(index=True)  # null: arrived, or given up
    tries: Mapped[int] = mapped_column(default=0)
    answered: Mapped[str | None]  # what came of the last try
    status: Mapped[int | None]  # of HTTP, where there was an answer
    delivered_at: Mapped[float | None]


class Removed(Base):
    """Where something stood in lists that is gone, for a while: who pages through them goes on from there."""

    __tablename__ = "removed"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[float]
    removed_at: Mapped[float] = mapped_column(index=True)


class Attempt(Base):
    """One run of a job by one worker, numbered by its fence."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str]
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    outcome: Mapped[str | None] = mapped_column(String(16))  # succeeded, failed, stopped, lost
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    exit_code: Mapped[int | None]  # negative: the signal
    retry_at: Mapped[float | None]  # of a failed one: the job is tried again, not before then


class Outbox(Base):
    """Announcements still to be published. Written with the job, in one commit; deleted once the broker has it.

    Without a foreign key: who announces another job than the one it holds would lock that one too, in whatever order.
    """

    __tablename__ = "outbox"
    # An id must never come again: who deletes a row after publishing it would delete somebody else's.
    __table_args__ = {"sqlite_autoincrement": True}

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(40))
    due_at: Mapped[float] = mapped_column(index=True)


class JobEvent(Base):
    """What happened to a job, apart from its steps."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "job_id", "id"), Index(None, "job_id", "reached", "id"))

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    at: Mapped[float]
    reached: Mapped[int] = mapped_column(server_default="0")  # the newest step before it, of those that still count
    type: Mapped[str] = mapped_column(String(24))
    step: Mapped[int | None]
    data: Mapped[dict[str, Any]]


class Point(Base):
    """One optimizer step. A step that was trained again after a resume replaces the earlier one."""

    __tablename__ = "points"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    loss: Mapped[float]
    learning_rate: Mapped[float]
    gradient_norm: Mapped[float]
    tokens: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]
    projection_seconds: Mapped[float]
    tokens_per_second: Mapped[float]
    mfu: Mapped[float | None]
    peak_device_bytes: Mapped[int | None] = mapped_column(BigInteger)
    peak_host_bytes: Mapped[int] = mapped_column(BigInteger)
    accuracy: Mapped[float | None]


class Evaluation(Base):
    __tablename__ = "evaluations"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    loss: Mapped[float]
    perplexity: Mapped[float]
    sequences: Mapped[int]
    seconds: Mapped[float]
    accuracy: Mapped[float | None]
    metrics: Mapped[dict[str, Any]] = mapped_column(server_default="{}")


class CheckpointRow(Base):
    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    path: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]
    stalled_seconds: Mapped[float] = mapped_column(server_default="0")
    loss: Mapped[float | None]


class Worker(Base):
    """Who is there to take jobs. Heard of through `seen_at`."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str] = mapped_column(server_default="")
    version: Mapped[str] = mapped_column(String(40), server_default="")
    device: Mapped[str] = mapped_column(String(8), server_default="cpu")  # gpu or cpu
    devices: Mapped[int] = mapped_column(server_default="1")
    gpus: Mapped[str]  # their names, as CUDA_VISIBLE_DEVICES has them
    registered_at: Mapped[float] = mapped_column(server_default="0")
    seen_at: Mapped[float]
    left_at: Mapped[float | None]  # said goodbye
    drain_requested_at: Mapped[float | None]  # takes no new job
    # Of the file system with its run directories.
    storage_size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    storage_free_bytes: Mapped[int | None] = mapped_column(BigInteger)


class ApiKey(Base):
    """Who may ask, for what, and how much of it. Never removed: jobs go on belonging to a revoked one."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str]
    secret_hash: Mapped[str] = mapped_column(
        String(64)
    )  # SHA-256 of 256 random bits: nothing to guess, nothing to salt
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]

    # Quotas; none: without limit.
    max_queued: Mapped[int | None]
    max_running: Mapped[int | None]
    max_device_hours: Mapped[float | None]
    max_storage_bytes: Mapped[int | None] = mapped_column(BigInteger)
    device_seconds: Mapped[float] = mapped_column(default=0.0)  # used so far, by all its jobs, deleted ones included


class Counter(Base):
    """Totals that must survive restarts and never go down; a histogram is one row a bucket, and its sum."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    label: Mapped[str] = mapped_column(String(40), primary_key=True)
    value: Mapped[float]
