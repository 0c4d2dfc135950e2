"""Where the bytes of uploaded files lie: in a directory of the installation's home, or wherever fsspec reaches (S3, …).

A file comes in through `Incoming`, a file of this machine beside those that are kept, so that a file system's rename is
all that is left to do. Names on disk are ours: nothing that a user calls a file becomes part of a path.

With STIEFEL_FILES_URL the directory holds copies only: a worker fetches what it needs and compares the checksum.
"""

import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jobs.errors import FileDamaged, StoreAway
from jobs.settings import Settings
from jobs.tables import StoredFile
from trainer import durable
from trainer.records import KINDS

log = logging.getLogger("stiefel.files")

PIECE = 2**20  # bytes that are read at a time
_PART = 8 * 2**20  # of an upload to S3 in parts
# Nobody writes to a file for so long and goes on.
_STALE_SECONDS = 3600
# A copy that nobody has asked for this long is removed.
_COPY_SECONDS = 30 * 24 * 3600


class Incoming:
    """A file on its way in. At the end of the block it is gone, unless `put` has taken it.

    Raises StoreAway where the disk takes no more.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = _incoming(settings) / secrets.token_hex(12)
        self.bytes, self._hash = 0, hashlib.sha256()
        with _reaching("written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb")

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # bytes that the disk did not take
            self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        with _reaching("written"):
            self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        """On the disk afterwards."""
        with _reaching("written"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def put(settings: Settings, stored: StoredFile, incoming: Incoming) -> None:
    """Take what has come in; durable afterwards. Raises StoreAway."""
    incoming.close()
    if settings.files_url:
        with _reaching("written"):
            fs, root = _store(settings)
            fs.makedirs(f"{root}/{stored.id}", exist_ok=True)
            # One part at a time: as many at once as the library likes would hold them all in memory.
            parts = {"chunksize": _PART, "max_concurrency": 1} if "s3" in _kinds(fs) else {}
            fs.put_file(str(incoming.path), f"{root}/{stored.id}/{_name(stored)}", **parts)
        _keep_copy(settings, stored, incoming)
    else:
        path = local_path(settings, stored)
        with _reaching("written"):
            path.parent.mkdir(parents=True)
            incoming.path.replace(path)
            for directory in (path.parent, settings.files):
                durable.sync(directory)


def local_path(settings: Settings, stored: StoredFile) -> Path:
    """Where it is on this machine, or will be after `ensure_local`."""
    return settings.files / stored.id / _name(stored)


def ensure_local(settings: Settings, stored: StoredFile) -> Path:
    """Its path, where it lies now with the bytes that were uploaded. Raises StoreAway and FileDamaged."""
    path = local_path(settings, stored)
    if settings.files_url and not path.exists():
        _fetch(settings, stored)
    try:
        if settings.files_url:
            os.utime(path.parent)
        found = _sha256(path)
    except FileNotFoundError as error:
        if settings.files_url:  # forgotten at this very moment
            raise StoreAway("read", f"{path} has just been removed") from error
        raise FileDamaged(stored.id, f"{path} is not there") from error
    except OSError as error:
        raise StoreAway("read", str(error)) from error
    if found != stored.sha256:
        if settings.files_url:
            path.unlink(missing_ok=True)
        raise FileDamaged(stored.id, f"its SHA-256 is {found}, not {stored.sha256}")
    return path


def pieces(settings: Settings, stored: StoredFile) -> Iterator[bytes]:
    """Its bytes, a piece at a time. Raises StoreAway and FileDamaged, before the first piece where that can be."""
    with _reaching("read"):
        try:
            if settings.files_url:
                fs, root = _store(settings)
                remote = f"{root}/{stored.id}/{_name(stored)}"
                file = fs.open(remote, "rb", block_size=_PART, cache_type="readahead")
            else:
                file = local_path(settings, stored).open("rb")
        except FileNotFoundError as error:
            raise FileDamaged(stored.id, "its bytes are not there") from error
        with file:
            while piece := file.read(PIECE):
                yield piece


def remove(settings: Settings, stored: StoredFile) -> None:
    """Here and in the store. Twice, it changes nothing. Raises StoreAway."""
    forget(settings, stored)
    if settings.files_url:
        with _reaching("written"):
            fs, root = _store(settings)
            for name in (f"{root}/{stored.id}/{_name(stored)}", f"{root}/{stored.id}"):
                if fs.exists(name):
                    fs.rm(name, recursive=True)


def release(settings: Settings, stored: StoredFile) -> None:
    """This machine needs no copy any longer."""
    if settings.files_url:
        forget(settings, stored)


def forget(settings: Settings, stored: StoredFile) -> None:
    with _reaching("written"):
        directory = local_path(settings, stored).parent
        if directory.exists():
            shutil.rmtree(directory)


def sweep(settings: Settings) -> None:
    """Remove what killed processes have left half written on this machine."""
    for path in _incoming(settings).glob("*"):
        with suppress(FileNotFoundError):  # taken, or removed by its own process
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                path.unlink()


def copies(settings: Settings) -> dict[str, bool]:
    """The files that this machine has copies of, by id: whether somebody has asked for it within 30 days."""
    found = {}
    for directory in settings.files.glob("file-*") if settings.files_url else ():
        with suppress(FileNotFoundError):  # forgotten by another process
            if not directory.is_dir():
                continue
            found[directory.name] = directory.stat().st_mtime > time.time() - _COPY_SECONDS
    return found


def forget_copy(settings: Settings, file_id: str) -> None:
    try:
        shutil.rmtree(settings.files / file_id)
    except FileNotFoundError:
        pass  # by another process
    except OSError as error:
        log.warning("the copy of %s cannot be removed: %s", file_id, error)


def is_stored(settings: Settings, stored: StoredFile) -> bool:
    """Whether the store has its bytes. Raises StoreAway."""
    with _reaching("read"):
        fs, root = _store(settings)
        return bool(fs.exists(f"{root}/{stored.id}/{_name(stored)}"))


def _incoming(settings: Settings) -> Path:
    return settings.files / "incoming"


def _name(stored: StoredFile) -> str:
    """By its suffix a reader knows its kind."""
    suffix = Path(stored.filename).suffix.lower()
    return f"data{suffix if suffix in KINDS else ''}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(settings: Settings, stored: StoredFile) -> None:
    """Whole under its name, or not there: two processes may do this at a time."""
    with Incoming(settings) as incoming:
        for piece in pieces(settings, stored):
            incoming.write(piece)
        incoming.close()
        _keep_copy(settings, stored, incoming)


def _keep_copy(settings: Settings, stored: StoredFile, incoming: Incoming) -> None:
    path = local_path(settings, stored)
    with _reaching("written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        incoming.path.replace(path)


def _store(settings: Settings) -> tuple[Any, str]:
    # Not needed for a directory, and not installed where there is none but that.
    from fsspec.core import url_to_fs

    # Other processes write here too: a listing must never be an old one.
    fs, root = url_to_fs(settings.files_url, use_listings_cache=False, skip_instance_cache=True)
    return fs, str(root).rstrip("/")


def _kinds(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextmanager
def _reaching(operation: str) -> Iterator[None]:
    """Each kind of store has errors of its own."""
    try:
        yield
    except (StoreAway, FileDamaged):
        raise
    except Exception as error:
        raise StoreAway(operation, f"{type(error).__name__}: {error}") from error
