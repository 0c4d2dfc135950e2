"""A worker says that it is there, again and again: to the database, and to whoever watches its process."""

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from jobs import files, filestore, workers
from jobs.database import Database
from jobs.errors import StoreAway
from jobs.settings import Settings
from jobs.workers import Card
from worker.devices import storage

_TIDY_SECONDS = 3600.0

log = logging.getLogger("stiefel.worker")


class Presence(threading.Thread):
    """From `start` to `end`. `tell` is told at each beat whether this worker is to take no new job."""

    def __init__(self, settings: Settings, card: Card, tell: Callable[[bool], None]) -> None:
        super().__init__(daemon=True)
        self._settings, self._card, self._tell = settings, card, tell
        self._database = Database(settings.url)
        self._ending = threading.Event()

    def run(self) -> None:
        tidied = -math.inf
        while not self._ending.is_set():
            if self._settings.alive_file is not None:
                _touch(self._settings.alive_file)
            try:
                self._tell(workers.seen(self._database, self._card, storage(self._settings)))
            except SQLAlchemyError as error:
                log.warning("the database is away, this worker is not announced: %s", error)
            if time.monotonic() >= tidied + _TIDY_SECONDS:
                tidied = time.monotonic()
                self._tidy()
            self._ending.wait(self._settings.beat_seconds)

    def _tidy(self) -> None:
        """Uploaded files that are deleted shall not stay here, nor what was fetched by half."""
        try:
            filestore.sweep(self._settings)
            files.forget_copies(self._database, self._settings)
        except (SQLAlchemyError, StoreAway, OSError) as error:
            log.warning("copies of files are tidied later: %s", error)

    def end(self) -> None:
        """Say goodbye."""
        self._ending.set()
        # A last hello must not come after the goodbye.
        self.join(self._settings.beat_seconds)
        try:
            workers.left(self._database, self._card.name)
        except SQLAlchemyError as error:
            log.warning("the database is away, this worker will be taken for lost: %s", error)
        finally:
            self._database.close()


def _touch(file: Path) -> None:
    try:
        file.touch()
    except OSError as error:
        log.warning("%s cannot be touched, this worker will be taken for dead: %s", file, error)
