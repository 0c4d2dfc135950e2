"""Processes of a stack as one sees them from the outside: found by command line, told apart by pid and start time."""

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

# A pid and when it was started: no other process will ever have both.
Identity = tuple[int, float]


def identity(process: psutil.Process) -> Identity:
    return process.pid, process.create_time()


def alive(process: psutil.Process) -> bool:
    """Whether it still is, and still this one; a zombie is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL those that still are the process that was meant, and wait for their end."""
    killed = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            killed.append(process)
    deadline = time.monotonic() + 20
    # A zombie has ended: whose parent is stopped, remains one for long.
    while any(map(alive, killed)) and time.monotonic() < deadline:
        time.sleep(0.01)


def suspend(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()


def resume(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants; empty if it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@dataclass(frozen=True)
class TrainerProcess:
    """A process that works in a run directory. `role`: trainer (also the launcher of ranks), torchrun, rank-0 …"""

    process: psutil.Process
    job_id: str
    role: str
    parent: int
    worker: str
    attempt: str = ""

    @property
    def identity(self) -> Identity:
        return identity(self.process)


def trainer_processes(runs: Path) -> list[TrainerProcess]:
    """Every live process that trains in a directory below `runs`, be it anybody's child or nobody's."""
    prefix = f"{runs}{os.sep}"
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()  # a zombie has none
            directories = [part for part in command if part.startswith(prefix)]
            if not directories:
                continue
            job_id = directories[0].removeprefix(prefix).partition(os.sep)[0]
            environment = process.environ()
            role = f"rank-{environment['RANK']}" if "RANK" in environment else "trainer"
            if "torch.distributed.run" in command:
                role = "torchrun"
            worker = environment.get("STIEFEL_WORKER", "")
            attempt = environment.get("STIEFEL_ATTEMPT", "")
            found.append(TrainerProcess(process, job_id, role, process.ppid(), worker, attempt))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
