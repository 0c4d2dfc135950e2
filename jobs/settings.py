"""What an installation can set, each by an environment variable STIEFEL_<NAME>."""

from functools import cached_property
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="STIEFEL_", frozen=True)

    home: Path = Field(default=Path(".stiefel"), description="run directories, locks, and the SQLite file")
    database_url: str = Field(default="", description="SQLAlchemy URL; default: a SQLite file in home")
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", description="the broker")
    queue: str = Field(default="stiefel", description="name of the Celery queue")

    gpus: str = Field(default="", description="the worker's GPUs as CUDA_VISIBLE_DEVICES has them; empty: all, or CPU")
    worker: str = Field(default="", description="the worker's name; default: host and GPUs")

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
    max_attempts: int = Field(default=3, ge=1, description="attempts of a job that ends in a retryable failure")
    backoff_seconds: float = Field(default=5, ge=0, description="before the second attempt; doubles with each")
    check_files: bool = Field(
        default=True, description="the API sees the trainers' files and checks them on submission"
    )

    @cached_property
    def url(self) -> str:
        return self.database_url or f"sqlite:///{self.home.absolute() / 'stiefel.db'}"

    @property
    def runs(self) -> Path:
        return self.home.absolute() / "runs"

    @property
    def locks(self) -> Path:
        return self.home.absolute() / "locks"
