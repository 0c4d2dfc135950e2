"""What a job starts from, by the names that users give it: uploaded files and fine-tuned models become paths.

A spec that is stored holds paths alone, so that a trainer needs to know nothing of the service. Files and models are
fetched and made by the worker, before it starts the trainer (`worker.inputs`).
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import files, filestore, models
from jobs.database import Database
from jobs.errors import FileUnknown, ModelNotFound, NotChecked, Refused
from jobs.files import Status
from jobs.keys import Caller
from jobs.models import TunedModel
from jobs.requests import FILE_ID, JobRequest
from jobs.settings import Settings
from jobs.tables import Job, JobFile, StoredFile
from trainer.config import TrainingSpec
from trainer.datasetconfig import Examples, ExamplesDataset, JsonlDataset, LabelledDataset, TextDataset
from trainer.methodcheck import rank_problem
from trainer.modelconfig import DirectoryModel, HubModel, PresetModel
from trainer.presets import PRESETS, shape_of_directory

# Which formats of a checked file a task can use.
_FORMATS = {"finetune": ("chat", "prompt", "text"), "classify": ("labelled",), "pretrain": ("text",)}
# A file is checked right after its upload. Whoever asks for a job in the same breath is kept waiting for so long.
PATIENCE_SECONDS = 20.0
_SECONDS_BETWEEN_LOOKS = 0.1
# Who waits has one of the process's threads, of which there are 40 for all requests: others are told to come back.
_WAITING = threading.BoundedSemaphore(8)


@dataclass(frozen=True)
class Inputs:
    """A resolved request: `files` are ids, `base` the job and step whose model is started from.

    `granted`: paths that its trainer may read besides what the installation allows; and which need not be there yet.
    """

    spec: TrainingSpec
    files: tuple[str, ...] = ()
    base: tuple[str, int] | None = None
    granted: tuple[str, ...] = ()


def resolve(
    database: Database,
    settings: Settings,
    caller: Caller,
    request: JobRequest,
    granted: Sequence[str] = (),
    patience: float = PATIENCE_SECONDS,
) -> Inputs:
    """Raises Refused for a file or model that is not there, NotChecked for a file that is still being looked at, and
    pydantic.ValidationError where the request's parts do not go together.

    `granted`: what the request's names allow to be read already.
    """
    changes: dict[str, Any] = {}
    paths = [*granted]
    base = _tuned(database, settings, caller, request)
    if base is not None:
        changes["model"] = base.spec
        paths.append(base.spec.path)
    ids: tuple[str, ...] = ()
    dataset = request.dataset
    if isinstance(dataset, TextDataset | JsonlDataset | Examples):
        named = _named(database, caller, request, patience)
        if named:
            at = {file.id: str(filestore.local_path(settings, file)) for file in named.values()}
            changes["dataset"] = _with_paths(request, named, lambda file: at.get(file, file))
            paths += at.values()
            ids = tuple(at)
    spec = request.model_copy(update=changes).spec()
    if base is not None:
        _check_rank(database, settings, base, spec)
    return Inputs(spec, ids, (base.job.id, base.step) if base else None, tuple(paths))


def of(session: Session, job: Job) -> list[StoredFile]:
    """The files that a job needs."""
    query = select(StoredFile).join(JobFile, JobFile.file_id == StoredFile.id).where(JobFile.job_id == job.id)
    return list(session.scalars(query.order_by(StoredFile.id)))


def stored(database: Database, caller: Caller, field: str, file_id: str, patience: float) -> StoredFile:
    """A file that has been checked, of those that the caller sees. Raises Refused and NotChecked."""
    deadline = time.monotonic() + patience
    file, waits = _usable(database, caller, field, file_id), False
    try:
        while file.status != Status.PROCESSED:
            waits = waits or _WAITING.acquire(blocking=False)
            if not waits or time.monotonic() > deadline:
                raise NotChecked(field, file_id)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            file = _usable(database, caller, field, file_id)
    finally:
        if waits:
            _WAITING.release()
    return file


def _usable(database: Database, caller: Caller, field: str, file_id: str) -> StoredFile:
    """Checked, or being checked."""
    try:
        file = files.get(database, file_id, caller.sees)
    except FileUnknown as error:
        raise Refused(field, str(error), "invalid_file") from error
    if file.purpose != files.UPLOADS:
        raise Refused(field, f"{file_id} is of purpose {file.purpose}; give one of {files.UPLOADS}", "invalid_file")
    if file.status == Status.ERROR:
        raise Refused(field, f"{file_id} cannot be used: {file.status_details}", "invalid_file")
    return file


def _tuned(database: Database, settings: Settings, caller: Caller, request: JobRequest) -> TunedModel | None:
    model = request.model
    if not isinstance(model, HubModel) or not model.hub.startswith(models.PREFIX):
        return None
    if model.revision != "main" or model.weights != "pretrained":
        raise Refused("model.hub", f"{model.hub!r} has no other revision and no random weights; name it alone")
    try:
        found = models.find(database, settings, caller, model.hub)
    except ModelNotFound as error:
        raise Refused("model.hub", str(error), "model_not_found") from error
    assert isinstance(found, TunedModel)
    if found.job.task == "classify" and request.task != "classify":
        raise Refused("model.hub", f"{model.hub!r} is a classifier: it can be trained on for task classify alone")
    return found


def _check_rank(database: Database, settings: Settings, base: TunedModel, spec: TrainingSpec) -> None:
    """The directory is not made yet: what is known of its shape is what its first ancestor has."""
    job: Job | None = base.job
    with database.reading() as session:
        while job is not None and job.base_run is not None:
            job = session.get(Job, job.base_run)
    model = TrainingSpec.model_validate(job.spec).model if job is not None else None
    shape = None
    if isinstance(model, PresetModel):
        shape = PRESETS[model.preset]
    elif isinstance(model, DirectoryModel) and settings.check_files and (Path(model.path) / "config.json").is_file():
        shape = shape_of_directory(Path(model.path))
    problem = rank_problem(spec.method, shape, base.name) if shape is not None else None
    if problem:
        raise Refused("method.rank", problem)


def _named(database: Database, caller: Caller, request: JobRequest, patience: float) -> dict[str, StoredFile]:
    """The uploaded files among a dataset's, by id."""
    fields = [("dataset.files", file) for file in getattr(request.dataset, "files", ())]
    fields += [("dataset.validation_files", file) for file in getattr(request.dataset, "validation_files", ())]
    found = {}
    for field, file_id in fields:
        if not FILE_ID.fullmatch(file_id):
            continue
        file = stored(database, caller, field, file_id, patience)
        if file.format not in _FORMATS[request.task]:
            wanted = ", ".join(_FORMATS[request.task])
            raise Refused(field, f"{file_id} holds {file.format} examples; task {request.task} takes {wanted}")
        found[file_id] = file
    return found


def _with_paths(request: JobRequest, named: dict[str, StoredFile], path_of: Callable[[str], str]) -> Any:
    """The dataset, its files by paths, with what is known of them from their uploads."""
    dataset = request.dataset
    assert isinstance(dataset, TextDataset | JsonlDataset | Examples)
    changes: dict[str, Any] = {"files": tuple(path_of(file) for file in dataset.files)}
    if isinstance(dataset, JsonlDataset):
        for file in named.values():
            if (column := file.columns.get("text", "text")) != dataset.field:
                raise Refused("dataset.field", f"{dataset.field!r}, but {file.id} has its text in {column!r}")
    if not isinstance(dataset, Examples):
        return dataset.model_copy(update=changes)
    changes["validation_files"] = tuple(path_of(file) for file in dataset.validation_files)
    of_glue = isinstance(dataset, LabelledDataset) and dataset.glue is not None
    for file in named.values():
        if of_glue:
            # What its files' columns are called is known; those of an upload are for its examination.
            continue
        if file.columns and dataset.columns not in ({}, file.columns):
            raise Refused("dataset.columns", f"{dataset.columns}, but {file.id} was uploaded with {file.columns}")
        if changes.setdefault("columns", file.columns or dataset.columns) != (file.columns or dataset.columns):
            raise Refused("dataset.columns", "the files were uploaded with different columns; use files of one kind")
        if isinstance(dataset, ExamplesDataset):
            if dataset.format not in ("auto", file.format):
                raise Refused("dataset.format", f"{dataset.format!r}, but {file.id} holds {file.format} examples")
            if changes.setdefault("format", file.format) != file.format:
                raise Refused("dataset.files", f"{file.id} holds {file.format} examples, others {changes['format']}")
    counts = [named[file].examples for file in dataset.files if file in named]
    if len(counts) == len(dataset.files):
        known = sum(count or 0 for count in counts)
        if dataset.examples not in (None, known):
            raise Refused("dataset.examples", f"{dataset.examples}, but the files have {known}; leave it out")
        changes["examples"] = known
    return dataset.model_copy(update=changes)
