"""The exporter over HTTP: all series with a database, one that says so without."""

import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from jobs import lease as leases
from jobs import reaper, submission, workers
from jobs.database import Database
from jobs.exporter import Exporter, Rounds
from jobs.failures import MEANINGS
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.workers import Card, Storage
from tests.conftest import Broker, job_body
from tests.jobs.test_lease import record, started, step


@pytest.fixture
def exporter(database: Database, settings: Settings) -> Iterator[Exporter]:
    made = Exporter(database, settings, "127.0.0.1", 0)
    made.start()
    yield made
    made.close()


def get(exporter: Exporter, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}{path}", timeout=20) as answer:
        return str(answer.read().decode())


def samples(exporter: Exporter) -> dict[tuple[str, str], float]:
    """(name, value of the first label) → value."""
    families = text_string_to_metric_families(get(exporter, "/metrics"))
    return {(s.name, [*s.labels.values(), ""][0]): s.value for family in families for s in family.samples}


def test_the_exporter_shows_every_job_and_what_waits(
    exporter: Exporter, database: Database, settings: Settings
) -> None:
    ids = [
        submission.create(database, settings, JobRequest.model_validate(job_body()), owner, None).id for owner in "ab"
    ]
    workers.seen(database, Card("w", "host", "0", (), 2), Storage(100, 25))
    lease = leases.claim(database, settings, ids[0], "w")
    assert lease is not None
    record(database, lease, [started(0), step(1, 1.5)], 10)
    found = samples(exporter)
    assert found["stiefel_job_train_loss", ids[0]] == 1.5
    assert found["stiefel_job_rollbacks_total", ids[0]] == found["stiefel_job_spikes_total", ids[0]] == 0
    assert found["stiefel_queue_depth", ""] == found["stiefel_workers_up", ""] == 1
    assert found["stiefel_announcements_waiting", ""] == 2
    assert found["stiefel_worker_storage_size_bytes", "w"] == 100
    assert found["stiefel_worker_storage_free_bytes", "w"] == 25
    assert found["stiefel_build_info", version("stiefel")] == 1


def test_what_never_happened_is_zero_and_not_absent(exporter: Exporter) -> None:
    found = samples(exporter)
    assert [found["stiefel_attempt_failures_total", reason] for reason in MEANINGS] == [0] * len(MEANINGS)
    assert [found["stiefel_jobs_finished_total", state] for state in ("succeeded", "failed", "cancelled")] == [0, 0, 0]
    assert found["stiefel_leases_expired_total", ""] == 0


def test_a_database_that_is_away_is_a_figure_and_the_exporter_stays(tmp_path: Path, settings: Settings) -> None:
    nowhere = Database("postgresql+psycopg://nobody:x@127.0.0.1:1/none")
    exporter = Exporter(nowhere, settings, "127.0.0.1", 0)
    exporter.start()
    try:
        found = samples(exporter)
        assert found["stiefel_database_up", ""] == 0
        assert ("stiefel_queue_depth", "") not in found
        assert get(exporter, "/healthz") == "ok\n"
    finally:
        exporter.close()


def test_other_paths_are_not_metrics(exporter: Exporter) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(exporter, "/")


def test_a_reaper_that_hangs_is_ill_and_one_that_fails_is_not() -> None:
    at = 0.0
    rounds = Rounds(CollectorRegistry(), lambda: at)
    at = 170.0
    rounds.ended(well=False)
    at = 340.0
    assert rounds.go_on
    at = 351.0
    assert not rounds.go_on


def test_the_reaper_says_when_it_last_succeeded(
    exporter: Exporter, database: Database, settings: Settings, broker: Broker
) -> None:
    quick = settings.model_copy(update={"upkeep_seconds": 0.01, "redis_url": broker.url})
    stop = threading.Event()
    reaping = threading.Thread(target=reaper.run, args=(database, quick, stop, exporter))
    reaping.start()
    pattern = re.compile(r"^stiefel_upkeep_last_success_timestamp_seconds (\S+)$", re.M)

    def last() -> float:
        found = pattern.search(get(exporter, "/metrics"))
        assert found is not None
        return float(found[1])

    began = last()
    while last() == began:
        assert reaping.is_alive()
    stop.set()
    reaping.join()
