"""Where checkpoints lie: a directory of this machine, or whatever fsspec reaches (S3, GCS, …).

A rank writes its file into a staging directory and hands it over. An object store has no rename, so nothing relies on
one: what makes a checkpoint count is its marker, which is written last and removed first.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.core import url_to_fs

from trainer import durable
from trainer.config import TrainingSpec
from trainer.errors import InfrastructureError, SpecError
from trainer.rundir import COMPLETE, RunDir, step_directory

_STEP = re.compile(r"step-(\d{8})")


class Place(Protocol):
    def url(self, step: int) -> str: ...

    def complete_steps(self) -> list[int]:
        """Ascending."""

    def sweep(self) -> None:
        """Remove what a killed writer or remover has left."""

    def remove(self, step: int) -> None: ...

    def staging(self, step: int) -> Path:
        """A directory of this machine where files of `step` are written before `store`."""

    def store(self, step: int, name: str) -> None:
        """Take the staged file; durable afterwards."""

    def write(self, step: int, name: str, data: bytes) -> None:
        """A small file, whole or as it was before; durable afterwards."""

    def discard(self, step: int, name: str) -> None:
        """Remove one file that `write` has made, and nothing else."""

    def read(self, step: int, name: str) -> bytes:
        """Raises OSError."""

    def fetch(self, step: int, names: list[str]) -> Path:
        """A directory of this machine that holds the files, as far as they exist."""

    def release(self, step: int) -> None:
        """What `fetch` has copied is no longer needed."""


def place_of(spec: TrainingSpec, rundir: RunDir) -> Place:
    """Raises SpecError where the URL's kind is unknown or its package is not installed."""
    url = spec.checkpoints.url
    if url is None:
        return Directory(rundir.checkpoints)
    name = rundir.root.resolve().name
    if url.startswith("file://"):
        return Directory(Path(url.removeprefix("file://")) / name)
    kind = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(kind)
    except ImportError as error:
        raise SpecError(f"checkpoints.url: {url!r} needs a package that is not installed here: {error}") from error
    except ValueError as error:
        raise SpecError(f"checkpoints.url: {kind}:// in {url!r} is nothing that fsspec knows: {error}") from error
    # Other processes write here too: a listing must never be an old one.
    fs, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return Remote(fs, f"{root.rstrip('/')}/{name}", url.rstrip("/") + f"/{name}", rundir.root / "transfer")


def check(place: Place) -> None:
    """Write, read and remove a few bytes: what cannot be written is to be known at the start, not at the first
    checkpoint. Raises InfrastructureError, to be tried again, because a store may be out of reach for a while."""
    try:
        place.write(0, "check", b"stiefel")
        place.read(0, "check")
        # Not more: there may be a checkpoint of step 0.
        place.discard(0, "check")
    except OSError as error:
        raise InfrastructureError(f"checkpoints.url: {place.url(0)} cannot be written: {error}") from error


class Directory:
    def __init__(self, root: Path) -> None:
        self._root = root

    def _of(self, step: int) -> Path:
        return self._root / step_directory(step)

    def url(self, step: int) -> str:
        return str(self._of(step))

    def complete_steps(self) -> list[int]:
        found = (_STEP.fullmatch(marker.parent.name) for marker in self._root.glob(f"step-*/{COMPLETE}"))
        return sorted(int(match[1]) for match in found if match)

    def sweep(self) -> None:
        complete = {self._of(step) for step in self.complete_steps()}
        for path in self._root.glob("step-*"):
            if path not in complete:
                shutil.rmtree(path)

    def remove(self, step: int) -> None:
        (self._of(step) / COMPLETE).unlink(missing_ok=True)
        if self._of(step).exists():
            shutil.rmtree(self._of(step))

    def staging(self, step: int) -> Path:
        self._of(step).mkdir(parents=True, exist_ok=True)
        return self._of(step)

    def store(self, step: int, name: str) -> None:
        durable.sync(self._of(step) / name)

    def write(self, step: int, name: str, data: bytes) -> None:
        durable.write(self.staging(step) / name, data)
        durable.sync(self._root)
        durable.sync(self._root.parent)

    def discard(self, step: int, name: str) -> None:
        (self._of(step) / name).unlink()
        with suppress(OSError):  # not empty: a checkpoint
            self._of(step).rmdir()

    def read(self, step: int, name: str) -> bytes:
        return (self._of(step) / name).read_bytes()

    def fetch(self, step: int, names: list[str]) -> Path:
        return self._of(step)

    def release(self, step: int) -> None:
        pass


class Remote:
    """`scratch` is a directory of this machine for files on their way. What goes wrong on it is an OSError."""

    def __init__(self, fs: Any, root: str, url: str, scratch: Path) -> None:
        self._fs, self._root, self._url, self._scratch = fs, root, url, scratch

    def _of(self, step: int) -> str:
        return f"{self._root}/{step_directory(step)}"

    def url(self, step: int) -> str:
        return f"{self._url}/{step_directory(step)}"

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        """Each kind of store has errors of its own."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{self._url}: {what}: {type(error).__name__}: {error}") from error

    def _steps(self) -> list[int]:
        try:
            with self._reaching("list"):
                names = [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)

    def complete_steps(self) -> list[int]:
        with self._reaching("list"):
            return [step for step in self._steps() if self._fs.exists(f"{self._of(step)}/{COMPLETE}")]

    def sweep(self) -> None:
        for step in set(self._steps()) - set(self.complete_steps()):
            self.remove(step)
        if self._scratch.exists():
            shutil.rmtree(self._scratch)

    def remove(self, step: int) -> None:
        with self._reaching("remove"):
            marker = f"{self._of(step)}/{COMPLETE}"
            if self._fs.exists(marker):
                self._fs.rm_file(marker)
            if self._fs.exists(self._of(step)):
                self._fs.rm(self._of(step), recursive=True)

    def staging(self, step: int) -> Path:
        path = self._scratch / f"out-{step_directory(step)}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def store(self, step: int, name: str) -> None:
        file = self.staging(step) / name
        with self._reaching("write"):
            self._fs.makedirs(self._of(step), exist_ok=True)
            self._fs.put_file(str(file), f"{self._of(step)}/{name}")
        file.unlink()

    def write(self, step: int, name: str, data: bytes) -> None:
        with self._reaching("write"):
            self._fs.makedirs(self._of(step), exist_ok=True)
            self._fs.pipe_file(f"{self._of(step)}/{name}", data)

    def discard(self, step: int, name: str) -> None:
        with self._reaching("remove"):
            self._fs.rm_file(f"{self._of(step)}/{name}")

    def read(self, step: int, name: str) -> bytes:
        with self._reaching("read"):
            data: bytes = self._fs.cat_file(f"{self._of(step)}/{name}")
        return data

    def fetch(self, step: int, names: list[str]) -> Path:
        path = self._scratch / f"in-{step_directory(step)}"
        path.mkdir(parents=True, exist_ok=True)
        with self._reaching("read"):
            for name in names:
                if not (path / name).exists() and self._fs.exists(f"{self._of(step)}/{name}"):
                    self._fs.get_file(f"{self._of(step)}/{name}", str(path / name))
        return path

    def release(self, step: int) -> None:
        shutil.rmtree(self._scratch / f"in-{step_directory(step)}", ignore_errors=True)
