"""The export of a checkpoint that lies beside its run, made once for whoever needs it. Imports no torch.

RUNDIR/exports/step-00000200/ is a Hugging Face directory. The worker starts from it when a job fine-tunes a fine-tuned
model, and the generator speaks with it. All of them are a cache: what is removed is made again. Beside each that was
made here lies step-00000200.used, whose time says when it was last asked for, and which is locked while it is in use.
A directory without one is somebody else's, and stays.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainer.errors import CheckpointError, leaf_of_exit_code
from trainer.rundir import RunDir

log = logging.getLogger("stiefel.exports")

# Of all exports beside the runs of an installation, those in use aside.
MOST_BYTES = 100 * 10**9
# Says otherwise.
EXPORTS_BYTES = "STIEFEL_EXPORTS_BYTES"
_TAIL_BYTES = 4000
_SECONDS_BETWEEN_LOOKS = 0.1
_ENDING = ".used"


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


@dataclass(frozen=True)
class Export:
    """Nobody removes it before `close`, or before the last process that has inherited the descriptor of `used` ends."""

    path: Path
    used: IO[bytes] | None

    def close(self) -> None:
        if self.used is not None:
            self.used.close()


def exported(
    rundir: RunDir,
    step: int,
    gone: threading.Event,
    most_bytes: int = MOST_BYTES,
    log: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Export | None:
    """The directory, made if it is not there: by a process of its own, which takes torch and its memory with it.

    Of several that ask at once one makes it and the others wait. Where one was made, others give way (see `tidy`). None
    where `gone` was set before it was there. What the exporter says goes to `log`, opened for appending and reading.
    Raises CheckpointError where there is no such run, ExportFailed.
    """
    if not rundir.spec.exists():
        raise CheckpointError(f"{rundir.root}, where the model of step {step} was, is gone or is not seen from here")
    rundir.exports.mkdir(exist_ok=True)
    out = rundir.export(step)
    with _alone(rundir.exports / "lock", gone) as lock, log or tempfile.TemporaryFile() as said:
        if lock is None:
            return None
        # It has its name only once it is whole.
        there = out.is_dir()
        if not there:
            for left in rundir.exports.glob(".*.partial-*"):
                # Of an exporter or a remover that was killed: whoever lives has the lock.
                shutil.rmtree(left)
            # First: what lies there without it is taken for somebody else's.
            _used(out).touch()
            code = _export(rundir, step, lock, gone, said, environment)
            # Whole, whatever has become of the exporter afterwards.
            made = out.is_dir()
            if not made:
                _used(out).unlink(missing_ok=True)
            if code is None:
                return None
            if not made:
                raise ExportFailed(rundir, step, code, _tail(said))
        export = _in_use(out)
    if not there:
        tidy(rundir.root.parent, most_bytes)
    return export


def tidy(runs: Path, most_bytes: int) -> None:
    """Remove exports that were made here, those first that were asked for longest ago, until what is left beside all
    `runs` has at most `most_bytes`. Those in use stay, whatever they have."""
    found = []
    for used in runs.glob(f"*/exports/step-*{_ENDING}"):
        # Somebody is quicker, or nobody may look: no reason to fail for whoever has made the newest.
        with contextlib.suppress(OSError):
            found.append((used.stat().st_mtime, _size(_of(used)), used))
    total = sum(size for _, size, _ in found)
    for _, size, used in sorted(found):
        if total <= most_bytes:
            return
        try:
            total -= size if _removed(used) else 0
        except FileNotFoundError:
            # Somebody was quicker, or its job is being deleted.
            total -= size
        except OSError as error:
            log.warning("%s, which others need the room of, cannot be removed: %s", _of(used), error)


def keep_configuration(export: Path, rundir: RunDir) -> None:
    """What a run that starts from an export of another's needs of it once it has checkpoints: what the model is. Its
    values are in its own checkpoints. Once only: a later export may be of another version."""
    if rundir.base.is_dir():
        return
    unfinished = rundir.base.with_name(rundir.base.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    # Code is there where the model brings its own.
    for path in (export / "config.json", *export.glob("*.py")):
        shutil.copy(path, unfinished)
    unfinished.rename(rundir.base)


def _in_use(out: Path) -> Export:
    """Called with the lock of its exports, as is whatever else changes the file."""
    used = _used(out)
    if not used.exists():
        return Export(out, None)
    used.touch()
    file = used.open("a+b")
    fcntl.flock(file, fcntl.LOCK_SH)
    return Export(out, file)


def _used(export: Path) -> Path:
    return export.with_name(export.name + _ENDING)


def _of(used: Path) -> Path:
    return used.with_name(used.name.removesuffix(_ENDING))


def _removed(used: Path) -> bool:
    """False where somebody uses it, or makes one beside it. Raises OSError."""
    with (used.parent / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with used.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Half of it must not look like an export.
        leaving = used.with_name(f".{_of(used).name}.partial-{os.getpid()}")
        _of(used).rename(leaving)
        used.unlink()
        shutil.rmtree(leaving)
    return True


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


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
