"""Starting and ending a trainer, and keeping two trainers off one set of GPUs."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

from jobs.settings import Settings
from jobs.tables import Job
from trainer.config import TrainingSpec
from trainer.rundir import RunDir


class GpuLock:
    """A file lock on this worker's GPUs (or, without any, on the worker's own name).

    The trainer inherits the descriptor, so the lock is free only when the worker's hold *and* the trainer are gone:
    a trainer that outlives its worker still keeps the next one away.
    """

    def __init__(self, settings: Settings, slot: str) -> None:
        settings.locks.mkdir(parents=True, exist_ok=True)
        self._path = settings.locks / f"{re.sub(r'[^A-Za-z0-9.,-]', '_', slot)}.lock"
        self.descriptor: int | None = None

    def try_acquire(self) -> bool:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        return True

    def release(self) -> None:
        """Give up this process's hold; a trainer that still lives keeps its own."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


@dataclass
class Trainer:
    """A running trainer process, leader of its own session and process group."""

    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """SIGKILL to the whole group: torchrun and every rank."""
        with contextlib.suppress(ProcessLookupError):  # ended by itself a moment ago: what we wanted
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def prepare(job: Job) -> RunDir:
    """The run directory of a job: its spec written, stop requests of earlier attempts gone."""
    rundir = RunDir(job.run_directory)
    rundir.root.mkdir(parents=True, exist_ok=True)
    spec = TrainingSpec.model_validate(job.spec)
    unfinished = rundir.spec.with_suffix(".tmp")
    unfinished.write_text(spec.model_dump_json(indent=1))
    unfinished.rename(rundir.spec)
    rundir.stop.unlink(missing_ok=True)
    return rundir


def start(rundir: RunDir, settings: Settings, lock: GpuLock) -> Trainer:
    """`python -m trainer run` in a session of its own, which ends with a checkpoint if this process dies."""
    assert lock.descriptor is not None
    environment = os.environ | {"STIEFEL_PARENT_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    if settings.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = settings.gpus
    with rundir.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "run", str(rundir.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=(lock.descriptor,),
        )
    return Trainer(process)
