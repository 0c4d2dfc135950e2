"""What this worker has: GPUs by name, or CPU slots. Asks the kernel, not torch, which only trainers load.

Device files, not /proc/driver/nvidia: a container may see all of its host's GPUs there, and has the files of its own.
"""

import itertools
import logging
import os
import re
import shutil
import socket
from importlib.metadata import version
from pathlib import Path

from jobs.settings import Settings
from jobs.workers import Card, Storage

log = logging.getLogger("stiefel.worker")

_DEVICES = Path("/dev")
_GPU = re.compile(r"nvidia\d+")


class NoGpus(Exception):
    """This worker was to have some."""


def card(settings: Settings, devices: Path = _DEVICES) -> Card:
    """This worker's card: the settings' GPUs, else all that NVIDIA's driver made, else CPU slots. Raises NoGpus."""
    gpus = _gpus(settings.gpus, devices)
    slots = len(gpus) or settings.cpu_slots or max(2, os.cpu_count() or 1)
    host = socket.gethostname()
    name = settings.worker or f"{host}:{','.join(gpus) or 'cpu'}"
    return Card(name, host, version("stiefel"), gpus, slots)


def storage(settings: Settings) -> Storage | None:
    """What the file system with the run directories has; None where it does not answer."""
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        usage = shutil.disk_usage(settings.home)
    except OSError as error:
        log.warning("%s cannot be looked at: %s", settings.home, error)
        return None
    return Storage(usage.total, usage.free)


def environment(gpus: tuple[str, ...], devices: int, device: str) -> dict[str, str]:
    """What a trainer of so many devices shall see: the first of the worker's GPUs, or none."""
    return {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else ",".join(gpus[:devices])}


def _gpus(setting: str, devices: Path) -> tuple[str, ...]:
    if setting == "none":
        return ()
    if setting == "all":
        if not (found := _gpus("", devices)):
            raise NoGpus(f"STIEFEL_GPUS=all, and there is no {devices}/nvidia0: does the container get the GPUs?")
        return found
    # As whoever starts this worker, or a container's runtime, has limited it.
    named = setting or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if named or "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [name.strip() for name in named.split(",") if name.strip()]
        # As CUDA has it: a negative number, and all behind it, is nothing.
        return tuple(itertools.takewhile(lambda name: not name.startswith("-"), names))
    # Numbered as CUDA does, which begins at 0 whatever the files are called.
    return tuple(str(index) for index in range(sum(bool(_GPU.fullmatch(file.name)) for file in devices.iterdir())))
