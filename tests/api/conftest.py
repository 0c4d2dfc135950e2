"""A service on a port of this machine, with a database that is made once and copied."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.database import Database
from jobs.settings import Settings
from migrations.__main__ import upgrade
from tests.api.protocol import served
from tests.api.room import Room
from trainer.process import free_port


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its schema, to be copied."""
    file = tmp_path_factory.mktemp("empty") / "stiefel.db"
    upgrade(f"sqlite:///{file}")
    return file


@pytest.fixture
def open_settings(tmp_path: Path, empty: Path) -> Settings:
    shutil.copy(empty, tmp_path / "stiefel.db")
    redis = f"redis://127.0.0.1:{free_port()}/0"
    return Settings(
        home=tmp_path, redis_url=redis, auth="off", lease_seconds=30, models={"ours": {"preset": "llama-1m"}}
    )


@pytest.fixture
def room(open_settings: Settings) -> Iterator[Room]:
    database = Database(open_settings.url)
    with served(open_settings) as service:
        yield Room(service, database)
    database.close()
