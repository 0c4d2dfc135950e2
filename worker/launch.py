"""Starting and ending a trainer."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from jobs import access
from jobs.settings import Settings
from jobs.tables import Job
from jobs.workers import Card
from trainer import durable, logs, tracing
from trainer.config import TrainingSpec
from trainer.rundir import RunDir
from worker.devices import environment

_OURS = "STIEFEL_"
_SECRETS = ("PGPASSWORD", "CELERY_BROKER_URL")


class Trainer:
    """A running trainer process, leader of its own session and process group."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        # A supervisor and its watchdog look at it and end it.
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Without collecting it: until `kill` does, the kernel gives its number to nobody else."""
        with self._lock:
            if self._process.returncode is not None:
                return True
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def ask_to_end(self) -> None:
        """As a stop request does, where one cannot be written."""
        with self._lock:
            if self._process.returncode is None:
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> int:
        """SIGKILL to the whole group; the exit code. Ranks under torchrun follow: each asked to die with its parent.

        Also of one that has ended: somebody of its group may be left. Twice, it changes nothing.
        """
        with self._lock:
            if self._process.returncode is None:
                os.killpg(self.pid, signal.SIGKILL)
            return self._process.wait()


def prepare(job: Job) -> RunDir:
    """The run directory of a job: its spec written, stop requests of earlier attempts gone."""
    rundir = RunDir(job.run_directory)
    rundir.root.mkdir(parents=True, exist_ok=True)
    spec = TrainingSpec.model_validate(job.spec)
    durable.write(rundir.spec, spec.model_dump_json(indent=1).encode())
    rundir.stop.unlink(missing_ok=True)
    return rundir


def start(
    rundir: RunDir,
    settings: Settings,
    card: Card,
    job: Job,
    attempt: int,
    descriptors: Sequence[int],
    granted: Sequence[str] = (),
) -> Trainer:
    """`python -m trainer run` in a session of its own, which ends with a checkpoint if this process dies.

    It inherits `descriptors`, and of this process's environment all but what is the service's own. What is `granted` it
    may read, whatever the installation allows else.
    """
    with rundir.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "run", str(rundir.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment_of(settings, card, job, attempt, granted),
            start_new_session=True,
            pass_fds=tuple(descriptors),
        )
    return Trainer(process)


def environment_of(
    settings: Settings, card: Card, job: Job, attempt: int, granted: Sequence[str] = ()
) -> dict[str, str]:
    """A trainer may run code that comes with a model: it shall not find the way to the database there."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_OURS) and k not in _SECRETS}
    ids = {"job_id": job.id, "attempt": str(attempt), "request_id": job.request_id or ""}
    return (
        inherited
        | {"STIEFEL_PARENT_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        # For its log and traces, and for whoever looks at processes.
        | {"STIEFEL_WORKER": card.name}
        | {logs.IDS[name]: value for name, value in ids.items()}
        | {logs.FORM: settings.log_format, logs.LEVEL: settings.log_level}
        | {tracing.TRACES: "off" if tracing.provider() is None else "otlp"}
        | {tracing.TRACEPARENT: tracing.traceparent() or ""}
        | environment(card.gpus, job.devices, card.device)
        | access.of(settings, granted).environment()
    )
