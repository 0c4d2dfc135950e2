"""Connections to the database."""

import threading
from pathlib import Path

from sqlalchemy import event, text

from jobs.database import Database


def test_connections_are_opened_once_however_many_are_used_at_a_time(tmp_path: Path) -> None:
    database, opened, most = Database(f"sqlite:///{tmp_path}/one.db"), [], 12
    event.listen(database.engine, "connect", lambda *_: opened.append(1))

    def together() -> None:
        all_there = threading.Barrier(most)

        def ask() -> None:
            with database.reading() as session:
                session.execute(text("SELECT 1"))
                all_there.wait(10)

        threads = [threading.Thread(target=ask) for _ in range(most)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    together()
    together()
    database.close()
    assert len(opened) == most
