"""The export of a checkpoint that stays beside its run, made once for whoever needs it. Imports no torch.

RUNDIR/exports/step-00000200/ is a Hugging Face directory. The worker starts from it when a job fine-tunes a fine-tuned
model, and the generator speaks with it.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer.errors import CheckpointError, leaf_of_exit_code
from trainer.rundir import RunDir

_TAIL_BYTES = 4000
_SECONDS_BETWEEN_LOOKS = 0.1


class ExportFailed(Exception):
    """`code` is the exporter's exit code, negative for a signal; `tail` the end of what it said."""

    def __init__(self, rundir: RunDir, step: int, code: int, tail: str) -> None:
        self.code, self.tail = code, tail
        words = tail.strip().rpartition("\n")[2][-500:]
        super().__init__(f"the checkpoint of step {step} in {rundir.root} cannot be exported: {words}")

    @property
    def name(self) -> str:
        """Of the leaf in trainer.errors that it ended with."""
        return leaf_of_exit_code(self.code).name


def exported(
    rundir: RunDir,
    step: int,
    gone: threading.Event,
    log: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Path | None:
    """The directory, made if it is not there: by a process of its own, which takes torch and its memory with it.

    Of several that ask at once one makes it and the others wait. None where `gone` was set before it was there. What
    the exporter says goes to `log`, opened for appending and reading. Raises CheckpointError where there is no such
    run, ExportFailed.
    """
    if not rundir.spec.exists():
        raise CheckpointError(f"{rundir.root}, where the model of step {step} was, is gone or is not seen from here")
    rundir.exports.mkdir(exist_ok=True)
    out = rundir.export(step)
    with _alone(rundir.exports / "lock", gone) as lock, log or tempfile.TemporaryFile() as said:
        if lock is None:
            return None
        # It has its name only once it is whole.
        if not out.is_dir():
            for left in rundir.exports.glob(".*.partial-*"):
                # Of an exporter that was killed: whoever lives has the lock.
                shutil.rmtree(left)
            code = _export(rundir, step, lock, gone, said, environment)
            if code is None:
                return None
            if code != 0:
                raise ExportFailed(rundir, step, code, _tail(said))
    return out


def _export(
    rundir: RunDir, step: int, lock: int, gone: threading.Event, said: IO[bytes], environment: Mapping[str, str] | None
) -> int | None:
    """Its exit code; None where it was ended because `gone` was set. It has the lock too, should it outlive us."""
    command = [sys.executable, "-m", "trainer", "export", str(rundir.root), str(rundir.export(step))]
    process = subprocess.Popen(
        [*command, "--checkpoint", str(step)],
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=subprocess.STDOUT,
        env=None if environment is None else dict(environment),
        start_new_session=True,
        pass_fds=(lock,),
    )
    try:
        while process.poll() is None:
            if gone.wait(_SECONDS_BETWEEN_LOOKS):
                return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return code


@contextmanager
def _alone(lock: Path, gone: threading.Event) -> Iterator[int | None]:
    """The descriptor of the lock, which is released with its last copy, also by processes that are killed; None where
    `gone` was set while somebody else had it."""
    with lock.open("a") as file:
        while not gone.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                gone.wait(_SECONDS_BETWEEN_LOOKS)
            else:
                yield file.fileno()
                return
        yield None


def _tail(said: IO[bytes]) -> str:
    """Whole lines."""
    size = said.seek(0, os.SEEK_END)
    start = said.seek(max(0, size - _TAIL_BYTES))
    text = said.read().decode(errors="replace")
    return text if start == 0 else text.partition("\n")[2]
