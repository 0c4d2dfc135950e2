"""No process of a trainer is left when its attempt is over.

Ranks are in sessions of their own, torchrun's doing, so that the end of the trainer's process group is not theirs. Each
asks the kernel to end it with torchrun, but only after a second of imports. Here a worker's process becomes the parent
of whatever loses its own below it (PR_SET_CHILD_SUBREAPER), and ends what it finds.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_SECONDS_BETWEEN_LOOKS = 0.02


def adopt() -> None:
    """Ask Linux to make this process the parent of orphans among its descendants. Elsewhere this does nothing."""
    if sys.platform.startswith("linux") and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end(run_directory: Path) -> int:
    """Kill every process below this one that trains the run directory, and wait until none is left; how many."""
    ended: set[int] = set()
    while found := [pid for pid in _below(os.getpid()) if _trains(pid, run_directory)]:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            ended.add(pid)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        _collect()
    _collect()
    return len(ended)


def _collect() -> None:
    """Take note of the end of adopted processes, which else stay in the kernel's table: those of other sessions."""
    for pid, (state, parent, session) in _processes().items():
        if state == "Z" and parent == os.getpid() and session != os.getsid(0):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _processes() -> dict[int, tuple[str, int, int]]:
    """Process id → (state, parent, session)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # Behind the name, which is in parentheses and may hold anything.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = fields[0], int(fields[1]), int(fields[3])
    return found


def _below(ancestor: int) -> Iterator[int]:
    """Processes whose parents lead to `ancestor`."""
    parents = {pid: parent for pid, (_, parent, _) in _processes().items()}
    for pid in parents:
        above = parents.get(pid)
        while above is not None and above != ancestor:
            above = parents.get(above)
        if above == ancestor:
            yield pid


def _trains(pid: int, run_directory: Path) -> bool:
    """By its command line, which a process that has ended has no longer."""
    try:
        return os.fsencode(run_directory) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
