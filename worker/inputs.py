"""What a job starts from, there before its trainer is: files fetched, the model of an earlier job exported.

A model is made once, under a lock, into the run directory of the job that has trained it, where it appears whole and
stays while it is in use (`trainer.exporting`). What its own exports need of it a job keeps: ancestors may be deleted.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs import filestore, inputs
from jobs.database import Database
from jobs.errors import FileDamaged, StoreAway
from jobs.failures import class_of
from jobs.lease import Outcome
from jobs.settings import Settings
from jobs.tables import Job, StoredFile
from trainer.errors import CheckpointError
from trainer.exporting import Export, ExportFailed, exported, keep_configuration
from trainer.rundir import RunDir


class Unmade(Exception):
    """An input cannot be had; `outcome` is what the attempt comes to."""

    def __init__(self, code: str, message: str, **more: Any) -> None:
        self.outcome = Outcome("failed", None, {"code": code, "message": message} | more)
        super().__init__(message)


@dataclass(frozen=True)
class Needs:
    """`base`: of the job whose model is started from, by its run directory; `granted`: paths that are there already."""

    files: tuple[StoredFile, ...]
    base: tuple[RunDir, int] | None
    granted: tuple[str, ...]


def needs(database: Database, job: Job) -> Needs:
    """Raises Unmade where the job that has made the model is gone."""
    with database.reading() as session:
        files = tuple(inputs.of(session, job))
        base = session.get(Job, job.base_run) if job.base_run is not None else None
    if job.base_run is not None and base is None:
        raise Unmade("bad_checkpoint", f"model: job {job.base_run}, whose model this starts from, has been deleted")
    assert base is None or job.base_step is not None
    return Needs(
        files,
        (RunDir(base.run_directory), job.base_step or 0) if base is not None else None,
        tuple((job.tuning or {}).get("granted", ())),
    )


@dataclass(frozen=True)
class Made:
    """`granted`: paths that the trainer may read besides. To be closed when the attempt has ended: then the model that
    it started from may be removed."""

    granted: tuple[str, ...]
    base: Export | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Which the trainer has too, should it outlive us."""
        return (self.base.used.fileno(),) if self.base is not None and self.base.used is not None else ()

    def close(self) -> None:
        if self.base is not None:
            self.base.close()


def make(
    settings: Settings, rundir: RunDir, needed: Needs, environment: Mapping[str, str], cancelled: threading.Event
) -> Made | None:
    """None if it was `cancelled` before all were there.

    What an exporter says goes to the log in `rundir`. Raises Unmade.
    """
    granted = [*needed.granted]
    for file in needed.files:
        if cancelled.is_set():
            return None
        try:
            granted.append(str(filestore.ensure_local(settings, file)))
        except FileDamaged as error:
            raise Unmade("bad_data", f"dataset.files: {error}") from error
        except StoreAway as error:
            raise Unmade("infrastructure", f"dataset.files: {file.id} cannot be fetched: {error}") from error
    if needed.base is None:
        return Made(tuple(granted))
    base = _exported(settings, *needed.base, rundir, environment, cancelled)
    if base is None:
        return None
    try:
        keep_configuration(base.path, rundir)
    except BaseException:
        base.close()
        raise
    return Made((*granted, str(base.path)), base)


def _exported(
    settings: Settings,
    base: RunDir,
    step: int,
    rundir: RunDir,
    environment: Mapping[str, str],
    cancelled: threading.Event,
) -> Export | None:
    try:
        with rundir.log.open("a+b") as log:
            return exported(base, step, cancelled, settings.exports_bytes, log, environment)
    except CheckpointError as error:
        raise Unmade("bad_checkpoint", f"model: {error}") from error
    except ExportFailed as error:
        kind = "killed" if error.code < 0 else class_of(error.name)
        raise Unmade(kind, f"model: {error}", exit_code=error.code, log_tail=error.tail) from error
