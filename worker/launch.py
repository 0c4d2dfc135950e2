"""Starting and ending a trainer, and keeping two trainers apart: off one set of GPUs, and off one run directory."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from jobs.settings import Settings
from jobs.tables import Job
from trainer.config import TrainingSpec
from trainer.rundir import RunDir


@dataclass
class Locks:
    """File locks that the trainer inherits.

    They are free only when this process has let go of them *and* the trainer is gone: a trainer that outlives its
    worker still keeps the next one away.
    """

    paths: list[Path]
    descriptors: list[int] = field(default_factory=list)

    def try_acquire(self) -> bool:
        """All or none."""
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self.descriptors.append(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                return False
        return True

    def release(self) -> None:
        """Give up this process's hold; a trainer that still lives keeps its own."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


def locks_of(settings: Settings, worker: str, run_directory: str) -> Locks:
    """One lock per GPU of this host (without named GPUs: on the worker's name), and one on the run directory."""
    slots = [f"gpu-{index.strip()}" for index in settings.gpus.split(",")] if settings.gpus else [f"worker-{worker}"]
    names = sorted(re.sub(r"[^A-Za-z0-9.-]", "_", f"{socket.gethostname()}-{slot}") for slot in slots)
    return Locks([*(settings.locks / f"{name}.lock" for name in names), Path(run_directory) / "lock"])


@dataclass
class Trainer:
    """A running trainer process, leader of its own session and process group."""

    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """SIGKILL to the whole group. Ranks under torchrun follow: each asked to die with its parent."""
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


def start(rundir: RunDir, settings: Settings, locks: Locks) -> Trainer:
    """`python -m trainer run` in a session of its own, which ends with a checkpoint if this process dies."""
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
            pass_fds=tuple(locks.descriptors),
        )
    return Trainer(process)
