"""Files that a power cut leaves whole: what these functions have done stays done. Imports no torch."""

import os
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Afterwards `path` holds `data`; whatever happens meanwhile, all of it or what was there before."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(data)
    # Before the new name: a file system may keep a rename and lose the bytes, which leaves an empty file.
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """A file's bytes, or the names in a directory, are on the disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
