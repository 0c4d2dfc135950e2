"""Whether uploaded files hold examples: uploaded → processed, or error with line and reason.

How one is examined: jobs/examiner.py. Who examines holds the file for a while (`checked_until`) and says so again and
again; what a dead process has left is taken up by the next one.

The API's processes do this, and remove what has expired, since they have the disk that files come in on; a reaper may
have none.
"""

import logging
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.exc import DataError, SQLAlchemyError

from jobs import examiner, files, filestore
from jobs.database import Database, now
from jobs.errors import FileDamaged, StoreAway
from jobs.files import Status
from jobs.settings import Settings
from jobs.tables import StoredFile

log = logging.getLogger("stiefel.files")

_HELD_SECONDS = 60.0
# Files that nobody has begun with for so long are anybody's.
_FORGOTTEN_SECONDS = 30.0
_UPKEEP_SECONDS = 10.0
_AT_A_TIME = 2


class Stopped(Exception):
    """The process that examines ends; another one takes the file up."""


class Checker:
    """Examines files, a few at a time, and looks after them. Each process of the API has one."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database, self._settings = database, settings
        self._pool = ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="filecheck")
        self._stop = threading.Event()
        self._lock, self._waiting = threading.Lock(), set[str]()
        self._keeper = threading.Thread(target=self._keep, name="filekeeper", daemon=True)

    def after_upload(self, stored: StoredFile) -> StoredFile:
        """Before the answer where that takes no time, else soon. Returns the file as it is now."""
        if stored.status == Status.UPLOADED:
            if examiner.is_quick(self._settings, stored, filestore.local_path(self._settings, stored)):
                try:
                    return check(self._database, self._settings, stored.id, self._stop) or stored
                except (SQLAlchemyError, StoreAway) as error:
                    log.warning("%s is examined later: %s", stored.id, error)
            self.submit(stored.id)
        return stored

    def submit(self, file_id: str) -> None:
        with self._lock:
            if file_id in self._waiting or self._stop.is_set():
                return
            self._waiting.add(file_id)
        self._pool.submit(self._check, file_id)

    def start(self) -> None:
        """Look after files until `close`."""
        self._keeper.start()

    def _keep(self) -> None:
        while not self._stop.wait(_UPKEEP_SECONDS):
            try:
                self.catch_up()
                files.remove_due(self._database, self._settings)
                filestore.sweep(self._settings)
                files.forget_copies(self._database, self._settings)
            except (SQLAlchemyError, StoreAway) as error:
                log.warning("files are looked after later: %s", error)
            except Exception:
                log.exception("files are looked after later")

    def catch_up(self) -> None:
        """Files that nobody examines, since whoever was to do it has died."""
        left = or_(StoredFile.checked_until < now(), StoredFile.checked_until.is_(None))
        old = StoredFile.created_at < now() - _FORGOTTEN_SECONDS
        query = select(StoredFile.id).where(StoredFile.status == Status.UPLOADED, left, old)
        with self._database.reading() as session:
            found = session.scalars(query.order_by(StoredFile.created_at).limit(2 * _AT_A_TIME)).all()
        for file_id in found:
            self.submit(file_id)

    def close(self) -> None:
        """What has begun is left to others."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        if self._keeper.is_alive():
            self._keeper.join()

    def _check(self, file_id: str) -> None:
        try:
            check(self._database, self._settings, file_id, self._stop)
        except (SQLAlchemyError, StoreAway) as error:
            log.warning("%s is examined later: %s", file_id, error)
        except Exception:
            log.exception("%s cannot be examined", file_id)
        finally:
            with self._lock:
                self._waiting.discard(file_id)


def check(database: Database, settings: Settings, file_id: str, stop: threading.Event) -> StoredFile | None:
    """uploaded → processed | error. None where it is somebody else's to do, or done. Raises StoreAway."""
    stored = _hold(database, file_id)
    if stored is None:
        return None
    hold = _Hold(database, stored, stop)
    try:
        path = filestore.ensure_local(settings, stored)
        report = examiner.examined(settings, stored, path, partial(_awaited, hold=hold))
    except FileDamaged as error:
        report = examiner.refused(str(error))
    except BaseException:
        hold.release()
        raise
    finally:
        filestore.release(settings, stored)
    try:
        return hold.finish(report)
    except (DataError, UnicodeError):
        # It would be the same again.
        log.exception("%s: the database cannot hold what was found", file_id)
        return hold.finish(examiner.refused(examiner.UNFORESEEN))


class _Hold:
    """The right to say what came of it: void as soon as somebody else has it."""

    def __init__(self, database: Database, stored: StoredFile, stop: threading.Event) -> None:
        self._database, self._stored, self.stop = database, stored, stop

    def _update(self, **values: Any) -> StoredFile | None:
        mine = (StoredFile.id == self._stored.id) & (StoredFile.checked_until == self._stored.checked_until)
        with self._database.transaction() as session:
            changed = update(StoredFile).where(mine, StoredFile.status == Status.UPLOADED).values(**values)
            return session.scalar(changed.returning(StoredFile))

    def renew(self) -> bool:
        """Whether it still is ours."""
        renewed = self._update(checked_until=now() + _HELD_SECONDS)
        self._stored = renewed or self._stored
        return renewed is not None

    def release(self) -> None:
        self._update(checked_until=None)

    def finish(self, report: dict[str, Any]) -> StoredFile | None:
        return self._update(
            status=Status.PROCESSED if report["fine"] else Status.ERROR,
            status_details=report["summary"] or None,
            format=report["format"],
            examples=report["examples"],
            statistics=report["statistics"],
            checked_until=None,
        )


def _hold(database: Database, file_id: str) -> StoredFile | None:
    free = or_(StoredFile.checked_until < now(), StoredFile.checked_until.is_(None))
    taken = update(StoredFile).where(StoredFile.id == file_id, StoredFile.status == Status.UPLOADED, free)
    with database.transaction() as session:
        return session.scalar(taken.values(checked_until=now() + _HELD_SECONDS).returning(StoredFile))


def _awaited(process: subprocess.Popen[bytes], hold: _Hold) -> tuple[bytes, str]:
    """What it wrote. Raises Stopped where this process ends or somebody else has taken the file up."""
    waited = 0.0
    while True:
        try:
            out, err = process.communicate(timeout=0.5)
        except subprocess.TimeoutExpired:
            waited += 0.5
            if hold.stop.is_set() or (waited % 15 == 0 and not hold.renew()):
                raise Stopped from None
        else:
            return out, err.decode(errors="replace")
