"""stiefel webhooks, against an API in this process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.main import create_app
from jobs import wishes
from jobs.database import Database
from jobs.settings import Settings
from tests.api.inprocess import served
from tests.jobs.test_webhooks import rows, submit


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
def url(settings: Settings, database: Database) -> Iterator[str]:
    with served(create_app(settings)) as found:
        yield found


def typed(url: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "cli.main", "webhooks", *arguments]
    environment = os.environ | {"STIEFEL_API": url, "COLUMNS": "250"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def test_a_webhook_from_its_making_to_its_end(url: str, settings: Settings, database: Database) -> None:
    made = json.loads(typed(url, "create", "http://127.0.0.1:9/", "--event", "job.cancelled", "--json"))
    assert made["event_types"] == ["job.cancelled"]
    assert "its secret: whsec_" in typed(url, "create", "http://127.0.0.1:9/", "--event", "job.failed")
    shown = typed(url, "list")
    assert made["id"] in shown and made["signing_secret"] not in shown
    wishes.cancel(database, settings, submit(database, settings, tuned=False).id)
    [row] = rows(database)
    sent = typed(url, "deliveries", made["id"])
    assert row.id in sent and row.job_id in sent and "pending" in sent
    assert "is deleted" in typed(url, "delete", made["id"])
    assert made["id"] not in typed(url, "list")
