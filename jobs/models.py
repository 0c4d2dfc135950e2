"""Models by name: the operator's, presets, the hub's, directories, and what jobs have trained.

A fine-tuned model is called ft:BASE:SUFFIX:HEX, where HEX is its job's id without "job-", and means the newest
checkpoint of a job that has succeeded. With :ckpt-step-N behind it, it means a checkpoint that is still kept, of a job
in whatever state. BASE is what the first of its ancestors was called.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.database import Database
from jobs.errors import ModelNotFound
from jobs.keys import Caller
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import CheckpointRow, Job
from trainer.checkpoint.retention import kept
from trainer.config import CheckpointSpec
from trainer.modelconfig import DirectoryModel, HubModel, ModelSpec, PresetModel
from trainer.presets import PRESETS
from trainer.rundir import RunDir

PREFIX = "ft:"
_TUNED = re.compile(r"ft:[^:]*:[^:]*:(?P<job>[0-9a-f]{20})(?::ckpt-step-(?P<step>[0-9]{1,10}))?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")
# So many of the newest fine-tuned models are listed.
_LISTED = 1000


@dataclass(frozen=True)
class BaseModel:
    """A model that no job has made. `listed`: by the operator or by us, so that its name alone says enough."""

    name: str
    spec: ModelSpec
    listed: bool

    @property
    def granted(self) -> tuple[str, ...]:
        """What its name allows to be read: the operator has put it there."""
        return (self.spec.path,) if self.listed and isinstance(self.spec, DirectoryModel) else ()


@dataclass(frozen=True)
class TunedModel:
    """A checkpoint of a job."""

    name: str
    job: Job
    step: int

    @property
    def path(self) -> Path:
        """Where it is as a Hugging Face directory, once somebody has exported it there."""
        return RunDir(self.job.run_directory).export(self.step)

    @property
    def spec(self) -> DirectoryModel:
        return DirectoryModel(path=str(self.path))


def find(database: Database, settings: Settings, caller: Caller, name: str) -> BaseModel | TunedModel:
    """What a name means to the caller. Raises ModelNotFound.

    Whether there is such a directory or repository of the hub, and whether it may be read, is not looked at.
    """
    if name.startswith(PREFIX):
        with database.reading() as session:
            return _tuned(session, caller, name)
    if name in settings.models:
        return BaseModel(name, settings.models[name], True)
    if name in PRESETS:
        return BaseModel(name, PresetModel(preset=name), True)
    if name.startswith("/"):
        return BaseModel(name, DirectoryModel(path=name), False)
    if _HUB_ID.fullmatch(name):
        return BaseModel(name, HubModel(hub=name), False)
    raise ModelNotFound(name)


def list_models(database: Database, settings: Settings, caller: Caller) -> list[BaseModel | TunedModel]:
    """The operator's, the presets, and the fine-tuned ones that the caller sees, newest first."""
    names = [*settings.models, *(name for name in PRESETS if name not in settings.models)]
    found: list[BaseModel | TunedModel] = []
    for name in names:
        found.append(find(database, settings, caller, name))
    newest = select(CheckpointRow.step).where(CheckpointRow.job_id == Job.id).order_by(CheckpointRow.step.desc())
    query = select(Job, newest.limit(1).scalar_subquery()).where(Job.state == State.SUCCEEDED)
    if caller.sees is not None:
        query = query.where(Job.owner == caller.sees)
    with database.reading() as session:
        for job, step in session.execute(query.order_by(Job.created_at.desc(), Job.id.desc()).limit(_LISTED)):
            if step is not None:
                found.append(TunedModel(name_of(job), job, step))
    return found


def name_of(job: Job, step: int | None = None) -> str:
    """Of the model that the job has made, or will have; with a step, of that checkpoint."""
    name = f"{PREFIX}{base_of(job)}:{_slug(_suffix(job))}:{job.id.removeprefix('job-')}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def base_of(job: Job) -> str:
    """What the first of its ancestors is called, in a form that a name can hold."""
    if job.tuning is not None:
        return str(job.tuning["base"])
    model = job.spec["model"]
    if job.base_run is not None:
        return "tuned"
    return _slug_of_path(model["path"]) if "path" in model else str(model.get("preset") or model["hub"])


def base_name(model: BaseModel | TunedModel) -> str:
    """The same, for a job that is about to start from this model."""
    if isinstance(model, TunedModel):
        return base_of(model.job)
    return _slug_of_path(model.name) if model.name.startswith("/") else model.name


def kept_steps(session: Session, job: Job) -> Sequence[int]:
    """Of the checkpoints that can still be read, in order."""
    rows = session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == job.id)).all()
    wanted = CheckpointSpec.model_validate(job.spec["checkpoints"])
    return sorted(kept({row.step: row.loss for row in rows}, wanted))


def _tuned(session: Session, caller: Caller, name: str) -> TunedModel:
    match = _TUNED.fullmatch(name)
    job = session.get(Job, f"job-{match['job']}") if match else None
    if match is None or job is None or caller.sees not in (None, job.owner):
        raise ModelNotFound(name)
    wanted = int(match["step"]) if match["step"] else None
    if name != name_of(job, wanted):
        raise ModelNotFound(name, f"that of its job is called {name_of(job, wanted)!r}")
    steps = kept_steps(session, job)
    has = ", ".join(map(str, steps)) or "none"
    if wanted is None and job.state != State.SUCCEEDED:
        raise ModelNotFound(name, f"its job is {job.state}; name one of its checkpoints (:ckpt-step-N): {has}")
    if not steps:
        raise ModelNotFound(name, "its checkpoints are deleted")
    if wanted is not None and wanted not in steps:
        raise ModelNotFound(name, f"no checkpoint of step {wanted} is kept, only of {has}; see checkpoints.keep")
    return TunedModel(name, job, steps[-1] if wanted is None else wanted)


def _suffix(job: Job) -> str:
    return str((job.tuning or {}).get("suffix") or "") if job.tuning is not None else job.name or ""


def _slug(text: str) -> str:
    """A name's parts are separated by colons, and it stands in paths."""
    return _NOT_OF_A_NAME.sub("-", text).strip("-")


def _slug_of_path(path: str) -> str:
    return _slug(Path(path).name) or "model"
