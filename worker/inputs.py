"""What a job starts from, there before its trainer is: files fetched, the model of an earlier job exported.

A model is made once, under a lock, into the run directory of the job that has trained it, where it appears whole.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import update

from jobs import filestore, inputs
from jobs.database import Database
from jobs.errors import FileDamaged, StoreAway
from jobs.failures import class_of
from jobs.lease import Outcome
from jobs.locks import Locks
from jobs.settings import Settings
from jobs.tables import Job, StoredFile
from trainer.errors import leaf_of_exit_code
from trainer.rundir import RunDir

_LOG_TAIL_BYTES = 4000
_SECONDS_BETWEEN_LOOKS = 0.1


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


def measured(database: Database, job_id: str, storage_bytes: int) -> None:
    """So large is the run directory of the job whose model was made there; it may have ended long ago."""
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(storage_bytes=storage_bytes))


def make(
    settings: Settings, rundir: RunDir, needed: Needs, environment: Mapping[str, str], cancelled: threading.Event
) -> tuple[str, ...] | None:
    """The paths that the job's trainer may read besides; None if it was `cancelled` before all were there.

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
    if needed.base is not None:
        path = _exported(*needed.base, rundir, environment, cancelled)
        if path is None:
            return None
        granted.append(path)
    return tuple(granted)


def _exported(
    base: RunDir, step: int, rundir: RunDir, environment: Mapping[str, str], cancelled: threading.Event
) -> str | None:
    out = base.export(step)
    if not base.spec.exists():
        message = f"model: {base.root}, where the model of step {step} was, is gone or is not seen by this worker"
        raise Unmade("bad_checkpoint", message)
    lock = Locks([base.exports / "lock"])
    while not lock.try_acquire():
        # Another worker makes it.
        if cancelled.wait(_SECONDS_BETWEEN_LOOKS):
            return None
    try:
        if out.is_dir():
            return str(out)
        for left in base.exports.glob(".*.partial-*"):
            # Of an exporter that was killed: whoever lives has the lock.
            shutil.rmtree(left)
        if not _export(base, step, rundir, environment, lock, cancelled):
            return None
    finally:
        lock.release()
    return str(out)


def _export(
    base: RunDir, step: int, rundir: RunDir, environment: Mapping[str, str], lock: Locks, cancelled: threading.Event
) -> bool:
    """Whether it came to its end. The exporter has the lock too, should it outlive this process."""
    command = [sys.executable, "-m", "trainer", "export", str(base.root), str(base.export(step))]
    with rundir.log.open("ab") as log:
        process = subprocess.Popen(
            [*command, "--checkpoint", str(step)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            pass_fds=tuple(lock.descriptors),
        )
    try:
        while process.poll() is None:
            if cancelled.wait(_SECONDS_BETWEEN_LOOKS):
                return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if code != 0:
        tail = rundir.log_tail(_LOG_TAIL_BYTES)
        words = tail.strip().rpartition("\n")[2][-500:]
        kind = "killed" if code < 0 else class_of(leaf_of_exit_code(code).name)
        message = f"model: the checkpoint of step {step} in {base.root} cannot be exported: {words}"
        raise Unmade(kind, message, exit_code=code, log_tail=tail)
    return True
