"""The export of a checkpoint that stays beside its run, made once for whoever needs it. Imports no torch.

RUNDIR/exports/step-00000200/ is a Hugging Face directory. The worker starts from it when a job fine-tunes a fine-tuned
model, and the generator speaks with it.
"""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import CheckpointError, TrainerError, leaf_of_exit_code
from trainer.rundir import RunDir

_SAID = 2000


def exported(rundir: RunDir, step: int) -> Path:
    """The directory, made if it is not there: by a process of its own, which takes torch and its memory with it.

    Of several that ask at once one makes it and the others wait. Raises TrainerError, of the leaf that the export ended
    with.
    """
    if not rundir.root.is_dir():
        raise CheckpointError(f"there is no run directory {rundir.root} here")
    rundir.exports.mkdir(exist_ok=True)
    out = rundir.export(step)
    with _alone(rundir.exports / "lock") as lock:
        # It has its name only once it is whole.
        if not out.is_dir():
            for left in rundir.exports.glob(".*.partial-*"):
                # Of an exporter that was killed: whoever lives has the lock.
                shutil.rmtree(left)
            _export(rundir, step, out, lock)
    return out


def _export(rundir: RunDir, step: int, out: Path, lock: int) -> None:
    """It has the lock too, should it outlive this process."""
    command = [sys.executable, "-m", "trainer", "export", str(rundir.root), str(out), "--checkpoint", str(step)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, pass_fds=(lock,))
    if done.returncode != 0:
        leaf = leaf_of_exit_code(done.returncode)
        said = f"step {step} of {rundir.root} cannot be exported: {done.stderr.strip()[-_SAID:]}"
        raise leaf(said) if leaf.__init__ is TrainerError.__init__ else TrainerError(said)


@contextmanager
def _alone(lock: Path) -> Iterator[int]:
    """The descriptor of the lock, which is released with its last copy, also by processes that are killed."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
