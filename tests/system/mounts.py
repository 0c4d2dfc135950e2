"""A small disk of a test's own, where the machine lets tests mount one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(at: Path, megabytes: int) -> Iterator[Path]:
    """A disk of so many megabytes at `at`. Skips the test, with the reason, where it may not be mounted."""
    at.mkdir(parents=True)
    made = _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "stiefel-test", str(at))
    if made.returncode != 0:
        pytest.skip(f"this needs the right to mount a small disk: {made.stderr.strip()}")
    try:
        yield at
    finally:
        # Lazily: a process that is about to end may still have a file open.
        _run("umount", "--lazy", str(at))


def make_read_only(at: Path, read_only: bool) -> None:
    done = _run("mount", "-o", f"remount,{'ro' if read_only else 'rw'}", str(at))
    assert done.returncode == 0, done.stderr


def fill(at: Path, leave: int) -> Path:
    """A file that leaves about so many bytes free."""
    file = at / "filler"
    with file.open("wb", buffering=0) as stream:
        while (free := _free(at)) > leave:
            stream.write(b"\x00" * min(free - leave, 1 << 20))
    return file


def _free(at: Path) -> int:
    found = os.statvfs(at)
    return found.f_bavail * found.f_frsize


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True)
