"""Of processes: ending with one's parent, starting again, ending at all, and a free port. Imports no torch."""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
# Set by trainer.child: the process id of the command that it became.
STARTED_BY = "STIEFEL_STARTED_BY"


def die_with_parent(number: signal.Signals, parent: int) -> None:
    """Ask Linux to send `number` to this process when `parent` ends; exit at once if it is gone already.

    Elsewhere than on Linux there is no such request, and this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number)) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(f"the parent process {parent} is gone")


class Origin:
    """How this process was started, as far as `again` needs it. To be made before anything is changed."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._inherited = {descriptor for descriptor in _open_descriptors() if os.get_inheritable(descriptor)}

    def again(self) -> NoReturn:
        """Become the program that this process was at first: same command, environment, parent and descriptors.

        What its starter has given it survives, a file lock above all; what was opened since is closed, also by native
        code, which may not ask for that.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in _open_descriptors():
            if descriptor not in self._inherited:
                os.set_inheritable(descriptor, False)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], self._environment)


def _open_descriptors() -> Iterator[int]:
    for name in [path.name for path in Path("/dev/fd").iterdir()]:
        with suppress(OSError):  # the listing's own is closed by now
            os.fstat(int(name))
            yield int(name)


def leave(code: int) -> NoReturn:
    """End this process at once, its output flushed.

    Native threads (gloo's above all) race with the interpreter's teardown, and now and then abort a process that has
    done all its work: "terminate called without an active exception", exit code -6.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
