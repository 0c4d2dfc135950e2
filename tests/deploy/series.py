"""What the exporter and the API really export, of a fleet to which everything has happened once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from api.main import create_app
from jobs import failures, reports, submission, upkeep, workers
from jobs import lease as leases
from jobs.database import Database
from jobs.exporter import Rounds
from jobs.lease import Lease, Outcome
from jobs.metrics import BuildCollector, FleetCollector
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.workers import Card, Storage
from migrations.__main__ import upgrade
from tests.conftest import job_body
from tests.jobs.test_lease import started
from trainer import events
from trainer.process import free_port

# What Prometheus itself adds to each series of a target, here and in Kubernetes, and the names of our targets.
TARGET: dict[str, set[str]] = {
    "job": {"stiefel-exporter", "stiefel-api"},
    "instance": set(),
    "pod": set(),
    "namespace": set(),
}


@dataclass
class Series:
    """Each series' name → its labels → the values that were seen. An empty set of values: any."""

    labels: dict[str, dict[str, set[str]]] = field(default_factory=dict)

    def add(self, families: Iterable[Metric]) -> None:
        for sample in (sample for family in families for sample in family.samples):
            known = self.labels.setdefault(sample.name, {label: set(values) for label, values in TARGET.items()})
            for label, value in sample.labels.items():
                known.setdefault(label, set()).add(value)


def exported(home: Path) -> Series:
    settings = Settings(home=home, redis_url=f"redis://127.0.0.1:{free_port()}/0", lease_seconds=30, auth="off")
    upgrade(settings.url)
    database, series = Database(settings.url), Series()
    _live(database, settings)
    rounds = CollectorRegistry()
    Rounds(rounds)
    for collector in (FleetCollector(database, settings), BuildCollector(), rounds):
        series.add(collector.collect())
    series.add(text_string_to_metric_families(_asked(settings)))
    database.close()
    # What Prometheus makes itself: of each target, and of our alerts.
    series.labels["up"] = {label: set(values) for label, values in TARGET.items()}
    series.labels["ALERTS"] = {"alertname": set(), "alertstate": {"firing", "pending"}, "severity": set()}
    return series


def _live(database: Database, settings: Settings) -> None:
    """One job for each class of failure, one that succeeded, one that runs, one that waits, one lost worker."""
    for name, gpus in (("gpus", ("0", "1")), ("cpus", ())):
        workers.seen(database, Card(name, "host", "0", gpus, 2), Storage(100, 25))
    for reason in failures.MEANINGS:
        error = {"code": reason, "message": "why"}
        leases.finish(database, settings, _claimed(database, settings), Outcome("failed", 1, error))
    lease = _claimed(database, settings)
    _report(database, lease)
    leases.finish(database, settings, lease, Outcome("succeeded", 0))
    _claimed(database, settings.model_copy(update={"lease_seconds": -1}))
    upkeep.requeue_lost(database, settings)
    _report(database, _claimed(database, settings))
    submission.create(database, settings, JobRequest.model_validate(job_body()))


def _claimed(database: Database, settings: Settings) -> Lease:
    job = submission.create(database, settings, JobRequest.model_validate(job_body()))
    lease = leases.claim(database, settings, job.id, "gpus")
    assert lease is not None
    return lease


def _report(database: Database, lease: Lease) -> None:
    found: Sequence[events.Event] = (
        started(0).model_copy(update={"device": "NVIDIA H200"}),
        events.Step(
            step=1,
            loss=2.0,
            learning_rate=0.1,
            gradient_norm=1.0,
            tokens=10,
            seconds=0.5,
            projection_seconds=0.1,
            tokens_per_second=20.0,
            mfu=0.4,
            peak_device_bytes=1,
            peak_host_bytes=1,
        ),
        events.Evaluated(step=1, loss=2.0, perplexity=7.4, sequences=1, seconds=0.1),
    )
    reports.record(database, lease, list(enumerate(found, start=1)), len(found))


def _asked(settings: Settings) -> str:
    """What an API says of its requests, some answered well, one not at all."""
    closed = Settings(home=settings.home / "nowhere", redis_url=settings.redis_url, auth="off")
    text = ""
    for its, paths in ((settings, ("/v1/jobs", "/healthz", "/metrics/api")), (closed, ("/v1/jobs", "/metrics/api"))):
        client = TestClient(
            create_app(its), base_url="http://127.0.0.1", client=("127.0.0.1", 1), raise_server_exceptions=False
        )
        with client:
            text += [client.get(path).text for path in paths][-1]
    return text
