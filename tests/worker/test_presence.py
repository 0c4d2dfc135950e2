"""What a worker does besides its job."""

import os
import threading
import time
from pathlib import Path

from jobs import files, filestore
from jobs.database import Database
from jobs.settings import Settings
from jobs.workers import Card
from migrations.__main__ import upgrade
from tests.jobs.test_files import stored
from worker.presence import Presence


def test_a_worker_forgets_its_copies_of_deleted_files(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, auth="off", files_url=f"memory://{tmp_path.name}")
    upgrade(settings.url)
    database = Database(settings.url)
    worker = settings.model_copy(update={"home": tmp_path / "worker", "database_url": settings.url})
    deleted, kept = stored(database, settings), stored(database, settings)
    gone, stays = (filestore.ensure_local(worker, file) for file in (deleted, kept))
    files.remove(database, settings, deleted.id)
    database.close()
    half = worker.files / "incoming" / "of-a-killed-worker"
    half.touch()
    os.utime(half, (0, 0))
    there = threading.Event()
    presence = Presence(worker, Card("w", "host", "0", (), 2), lambda _: there.set())
    presence.start()
    try:
        assert there.wait(30)
        deadline = time.monotonic() + 30
        while gone.parent.exists() or half.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        presence.end()
    assert stays.exists()
