"""The files of a dataset. Imports no torch."""

import glob
import hashlib
import os
import sysconfig
from pathlib import Path

from trainer.errors import DataError

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def find_files(patterns: tuple[str, ...]) -> list[Path]:
    """Files of paths and globs, sorted within each pattern. Raises DataError for one that matches nothing."""
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
        if not matches:
            raise DataError(f"dataset.files: nothing matches {pattern!r}; give a file or a glob that the trainer sees")
        found += matches
    return list(dict.fromkeys(found))


def stdlib_files() -> list[Path]:
    """Python's own library without its tests, in an order that depends on the names alone but mixes the packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _NOT_LIBRARY]
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda file: hashlib.sha256(str(file.relative_to(root)).encode()).digest())
