"""Several ranks on this host: torchrun as a child, with this process between it and whoever asked. Imports no torch.

torchrun answers SIGTERM by giving its ranks thirty seconds, and ends with 1 whatever they ended with. So this process
turns SIGTERM into a stop request, which has as long as a checkpoint takes, and finds the exit code in the events.
"""

import os
import signal
import subprocess
import sys
from types import FrameType

from trainer import errors, events
from trainer.process import free_port
from trainer.rundir import RunDir


def run_ranks(rundir: RunDir, processes: int) -> int:
    """Train with one process per rank and wait, and again after a rollback; the exit code is of `trainer.errors`."""
    asked = False
    running: list[subprocess.Popen[bytes]] = []

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if rundir.stop.exists():
            return
        try:
            rundir.stop.touch()
            asked = True
        except OSError as error:
            print(f"{rundir.stop} cannot be written ({error}): torchrun is told instead", file=sys.stderr)
            for process in running:
                process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    code = errors.RolledBackError.exit_code
    while code == errors.RolledBackError.exit_code:
        code = _run_once(rundir, processes, running)
    if asked:
        rundir.stop.unlink(missing_ok=True)
    return code


def _run_once(rundir: RunDir, processes: int, running: list[subprocess.Popen[bytes]]) -> int:
    """`running` holds torchrun meanwhile."""
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    command = [
        *(sys.executable, "-m", "trainer.child", str(os.getpid())),
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *("-m", "trainer", "run", str(rundir.root)),
    ]
    before = rundir.events.stat().st_size if rundir.events.exists() else 0
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    # torchrun outlives this process by as long as its ranks take to end: it holds the locks that this one was given.
    running[:] = [subprocess.Popen(command, env=environment, close_fds=False)]
    code = running[0].wait()
    return _exit_code(code, [event for _, event in events.read_from(rundir.events, before)[0]])


def _exit_code(code: int, found: list[events.Event]) -> int:
    end = events.ending(found)
    if end is None:
        return code if code >= 0 else 128 - code
    return errors.exit_code_of(end.reason) if isinstance(end, events.Failed) else 0
