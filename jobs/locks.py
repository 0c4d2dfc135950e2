"""Keeping two trainers off one set of GPUs and off one run directory, and whoever removes one off a trainer's."""

import fcntl
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from jobs.settings import Settings
from jobs.workers import Card


@dataclass
class Locks:
    """File locks that the trainer inherits.

    They are free only when this process has let go of them *and* the trainer is gone: a trainer that outlives its
    worker still keeps the next one away.
    """

    paths: list[Path]
    descriptors: list[int] = field(default_factory=list)

    def try_acquire(self) -> bool:
        """All or none. Raises OSError where a lock cannot even be opened."""
        try:
            for path in self.paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
                fcntl.flock(self.descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Give up this process's hold; a trainer that still lives keeps its own."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


def device_locks(settings: Settings, card: Card) -> Locks:
    """One for each GPU of this host that the worker has; without GPUs one on its name."""
    slots = [f"gpu-{index}" for index in card.gpus] or [f"worker-{card.name}"]
    names = sorted(re.sub(r"[^A-Za-z0-9.-]", "_", f"{card.host}-{slot}") for slot in slots)
    return Locks([settings.locks / f"{name}.lock" for name in names])


def run_lock(run_directory: str) -> Locks:
    """The one on a job's run directory."""
    return Locks([Path(run_directory) / "lock"])
