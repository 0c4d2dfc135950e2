"""What an installation can set, each by an environment variable STIEFEL_<NAME>."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from jobs.outward import Reach
from trainer.exporting import MOST_BYTES
from trainer.logs import Form, Level
from trainer.modelconfig import DirectoryModel, ModelSpec

# How a model of the operator's may be called: nothing that is a path, or the name of a fine-tuned one.
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="STIEFEL_", frozen=True)

    home: Path = Field(default=Path(".stiefel"), description="run directories, locks, and the SQLite file")
    database_url: str = Field(default="", description="SQLAlchemy URL; default: a SQLite file in home")
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        description="the broker; with TLS (rediss://) its certificate is checked unless it says ssl_cert_reqs=none",
    )
    queue: str = Field(default="stiefel", description="what the names of the Celery queues begin with")

    gpus: str = Field(
        default="",
        description="the worker's GPUs as CUDA_VISIBLE_DEVICES has them; all: those that there are, one at least; "
        "none: CPUs; default: the GPUs that there are, else CPUs",
    )
    cpu_slots: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="ranks at a time, of a worker without GPUs; default: its cores, 2 or more",
    )
    worker: str = Field(default="", description="the worker's name; default: host and devices")
    alive_file: Path | None = Field(
        default=None, description="a worker touches this file with each beat, for `python -m worker.alive`"
    )
    trust_remote_code: bool = Field(
        default=False, description="let models and tokenisers bring Python code of their own, which trainers then run"
    )

    lease_seconds: float = Field(
        default=60, gt=0, description="a worker that has not been heard of for so long is lost"
    )
    beat_seconds: float = Field(default=10, gt=0, description="a worker renews its lease this often")
    poll_seconds: float = Field(
        default=1, gt=0, description="a worker looks at its trainer and its requests this often"
    )
    grace_seconds: float = Field(default=120, gt=0, description="from a stop request to SIGKILL")
    upkeep_seconds: float = Field(default=2, gt=0, description="the reaper looks this often")
    reannounce_seconds: float = Field(default=60, gt=0, description="a job queued for so long is announced again")
    max_attempts: int = Field(
        default=3, ge=1, description="failures in a row, without a new checkpoint, that end a job"
    )
    max_losses: int = Field(
        default=10, ge=1, description="workers lost in a row, likewise: it may be what takes them down"
    )
    backoff_seconds: float = Field(default=5, ge=0, le=3600, description="before the second attempt; doubles with each")
    preemption: bool = Field(
        default=False, description="a job may stop one of lower priority, which checkpoints and is queued again"
    )
    largest_job: int | None = Field(
        default=None, ge=1, description="refuse jobs of more devices; default: they wait for a worker that fits"
    )
    check_files: bool = Field(
        default=True, description="the API sees the trainers' files and checks them on submission"
    )

    log_format: Form = Field(default="text", description="of the logs on standard error: text, or JSON lines")
    log_level: Level = Field(default="info", description="the least that is logged")
    traces: Literal["off", "otlp"] = Field(
        default="off", description="whether OpenTelemetry traces are sent; OTEL_EXPORTER_OTLP_ENDPOINT says where"
    )

    auth: Literal["on", "off"] = Field(
        default="on", description="whether the API asks for API keys; without, it answers this machine alone"
    )
    open_metrics: bool = Field(default=False, description="/metrics asks for no API key")
    requests_per_minute: int = Field(default=600, ge=1, description="of one API key, to one API process")
    failed_keys_per_minute: int = Field(default=30, ge=1, description="wrong API keys of one address, likewise")
    max_body_bytes: int = Field(default=2**20, ge=1024, description="largest body of a request")
    exports_bytes: int = Field(
        default=MOST_BYTES,
        ge=0,
        description="of the models of jobs that were made for further fine-tuning and for trying them out, beside all "
        "runs; those not used for longest are removed, and made again when they are asked for",
    )
    readable: str = Field(
        default="",
        description="directories, separated by ':', that jobs may name files, models and tokenisers in; *: any; "
        "default: any without API keys, none with them",
    )
    files_url: str = Field(
        default="",
        description="where uploaded files are kept, for this installation alone: a URL that fsspec knows, such as "
        "s3://bucket/files; default: home, which API and workers then share",
    )
    files_tokenizer: str = Field(
        default="bytes",
        min_length=1,
        description="counts the tokens of uploaded files: bytes, a directory that the API sees, or a name of the hub "
        "(with pip install 'stiefel[tokenizers]', but for bytes)",
    )
    max_file_bytes: int = Field(default=512 * 2**20, ge=1, description="largest file that is uploaded")
    writable: str = Field(
        default="",
        description="directories and URLs, separated by spaces, below which jobs may have checkpoints and NVMe files "
        "besides their run directories; *: any; default: any without API keys, none with them",
    )

    models: Annotated[dict[str, ModelSpec], NoDecode] = Field(
        default={},
        description='models by names of the operator\'s, for fine-tuning: a JSON object of name → {"path": …}, '
        '{"hub": …} or {"preset": …}. Whoever may submit jobs may name them, whatever `readable` says',
    )

    @field_validator("models", mode="before")
    @classmethod
    def _models_of_json(cls, given: Any) -> Any:
        """Empty is as good as unset: compose files pass on what nobody has set."""
        if not isinstance(given, str):
            return given
        try:
            return json.loads(given or "{}")
        except ValueError as error:
            raise ValueError(f"STIEFEL_MODELS: {given!r} is not JSON: {error}") from error

    @field_validator("models")
    @classmethod
    def _names_of_models(cls, models: dict[str, ModelSpec]) -> dict[str, ModelSpec]:
        for name, model in models.items():
            if not _ALIAS.fullmatch(name):
                raise ValueError(
                    f"STIEFEL_MODELS: {name!r} cannot be a model's name; use letters, digits, '.', '_', '/' and '-', "
                    "at most 128, a letter or digit first"
                )
            if isinstance(model, DirectoryModel) and not Path(model.path).is_absolute():
                raise ValueError(f"STIEFEL_MODELS: {name!r} has the relative path {model.path!r}; give an absolute one")
        return models

    webhooks: Literal["", "off", "public", "any"] = Field(
        default="",
        description="whom the reaper calls for users' webhooks: nobody, public addresses over https, or any address, "
        "also of this machine and its network; default: public with API keys, any without them",
    )

    generator_url: str = Field(
        default="",
        pattern=r"^(https?://\S+)?$",
        description="of `python -m trainer serve`, for trying models out; default: there is none",
    )
    generator_secret: str = Field(
        default="", repr=False, description="what the generator asks the API for: 16 characters or more, on both sides"
    )

    generator_seconds: float = Field(
        default=120, gt=0, description="that a request waits for the generator at most, and that it speaks at most"
    )

    @model_validator(mode="after")
    def _generator_knows_us(self) -> Self:
        if self.generator_url and len(self.generator_secret) < 16:
            raise ValueError("STIEFEL_GENERATOR_SECRET: give the generator's own, of 16 characters or more")
        return self

    @model_validator(mode="after")
    def _beats_in_time(self) -> Self:
        if self.lease_seconds < 3 * self.beat_seconds:
            raise ValueError(
                f"STIEFEL_LEASE_SECONDS: {self.lease_seconds:g} is below three times STIEFEL_BEAT_SECONDS "
                f"({self.beat_seconds:g}): one late beat would end a training"
            )
        return self

    @property
    def worker_timeout(self) -> float:
        """A worker that has not been seen for so many seconds is away."""
        return 3 * self.beat_seconds + 2

    @property
    def webhooks_reach(self) -> Reach:
        """Without API keys, only somebody who could call from this machine themselves can ask for it."""
        return self.webhooks or ("any" if self.auth == "off" else "public")

    @cached_property
    def url(self) -> str:
        return self.database_url or f"sqlite:///{self.home.absolute() / 'stiefel.db'}"

    @property
    def runs(self) -> Path:
        return self.home.absolute() / "runs"

    @property
    def files(self) -> Path:
        """Uploaded files; with files_url, copies of them and those on their way."""
        return self.home.absolute() / "files"

    @property
    def locks(self) -> Path:
        return self.home.absolute() / "locks"
