"""Prometheus metrics of jobs and fleet, from the database at each scrape.

One prefix, base units. Labels of a job's series are job_id and method; everything else about it is on stiefel_job_info.
"""

import logging
from collections.abc import Iterable, Mapping
from importlib.metadata import version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from jobs import counters, deliveries, failures, fleet
from jobs.database import Database
from jobs.settings import Settings
from jobs.states import TERMINAL
from jobs.tables import Job
from jobs.workers import Storage

log = logging.getLogger("stiefel.metrics")

# (metric, help, key in the job's figures)
_FIGURES = (
    ("train_loss", "Loss of the last step", "loss"),
    ("evaluation_loss", "Loss on held-out sequences", "evaluation_loss"),
    ("gradient_norm", "Norm of the trained parameters' gradient, before clipping", "gradient_norm"),
    ("learning_rate", "Learning rate of the last step", "learning_rate"),
    ("tokens_per_second", "Tokens trained on in a second, over all ranks", "tokens_per_second"),
    ("mfu_ratio", "Model FLOPs utilisation in bf16, where the hardware is known", "mfu"),
    ("peak_device_memory_bytes", "Largest allocation on an accelerator, of all ranks", "peak_device_bytes"),
    ("peak_host_memory_bytes", "Largest resident size of a rank", "peak_host_bytes"),
    ("optimizer_state_bytes", "Moments of all ranks together", "optimizer_state_bytes"),
)
_TOTALS = (
    ("tokens_total", "Tokens trained on, repeated steps included", "tokens_total"),
    ("projection_seconds_total", "Time spent on choosing subspaces", "projection_seconds_total"),
    ("step_seconds_total", "Time spent on steps", "step_seconds_total"),
)
# Of these, none so far is 0.
_INCIDENTS = (
    ("spikes_total", "How often the loss stayed far above what is usual", "spikes"),
    ("rollbacks_total", "How often the loss sent the run back to a checkpoint", "rollbacks"),
)

# (metric, help, field of the snapshot)
_GAUGES = (
    ("queue_depth", "Jobs that wait for a worker", "queued"),
    ("queue_oldest_seconds", "How long the oldest of them has waited", "oldest_queued_seconds"),
    ("announcements_waiting", "Announcements of queued jobs that are due and not published", "announcements_due"),
    ("webhook_deliveries_pending", "Webhooks' messages not arrived and not given up", "deliveries_pending"),
    ("webhook_deliveries_due", "Those whose next try is due and has not begun", "deliveries_due"),
    ("files", "Uploaded files and results", "files"),
    ("files_bytes", "Their size", "files_bytes"),
    ("jobs_unschedulable", "Queued jobs that no worker that is up could take", "unschedulable"),
    ("jobs_startable", "Queued jobs that an idle worker could take now", "startable"),
    ("jobs_not_exported", "Running or recent jobs left out of the series per job", "jobs_left_out"),
    ("workers_up", "Workers heard of lately", "workers_up"),
    ("workers_busy", "Jobs under a valid lease", "workers_busy"),
    ("workers_drained", "Workers that take no new job", "workers_drained"),
)
# (metric, help, label, every value of the label): one that begins at 1 has, for Prometheus, never increased.
_LABELLED = (
    ("jobs_finished", "Jobs that ended, by state", "state", TERMINAL),
    ("webhook_deliveries", "Messages sent to webhooks, by what came of it", "outcome", deliveries.OUTCOMES),
    ("attempt_failures", "Attempts that failed, by class of failure", "reason", tuple(failures.MEANINGS)),
)


class FleetCollector(Collector):
    """`of`: whose jobs have series of their own; None for everybody's."""

    def __init__(self, database: Database, settings: Settings, of: str | None = None) -> None:
        self._database, self._settings, self._of = database, settings, of

    def describe(self) -> Iterable[Metric]:
        return []  # else registering would ask the database

    def collect(self) -> Iterable[Metric]:
        """A database that is away is a series too: whoever is woken by it must not look for the exporter first."""
        try:
            seen = fleet.snapshot(self._database, self._settings, self._of)
        except SQLAlchemyError as error:
            log.warning("the database is away, its figures are missing: %s", error)
            seen = None
        yield GaugeMetricFamily("stiefel_database_up", "Whether the database answered", value=seen is not None)
        if seen is not None:
            yield from _fleet(seen)
            yield from _jobs(seen.jobs)


class BuildCollector(Collector):
    """What answers, of each process that is asked."""

    def collect(self) -> Iterable[Metric]:
        info = GaugeMetricFamily("stiefel_build_info", "The version that answers; always 1", labels=["version"])
        info.add_metric([version("stiefel")], 1)
        yield info


def _fleet(seen: fleet.Fleet) -> Iterable[Metric]:
    jobs = GaugeMetricFamily("stiefel_jobs", "Jobs by state and method", labels=["state", "method"])
    for (state, method), number in seen.jobs_by_state.items():
        jobs.add_metric([state, method], number)
    yield jobs
    for name, text, field in _GAUGES:
        yield GaugeMetricFamily(f"stiefel_{name}", text, value=getattr(seen, field))
    slots = GaugeMetricFamily(
        "stiefel_device_slots", "GPUs and CPU slots of the workers that are up", labels=["device", "state"]
    )
    for device in ("gpu", "cpu"):
        for state in ("busy", "idle"):
            slots.add_metric([device, state], seen.devices.get((device, state), 0))
    yield slots
    yield from _storage(seen.storage)
    yield _histogram(seen, counters.QUEUE_WAIT, "stiefel_queue_wait_seconds", "From queued to claimed")
    yield _histogram(seen, counters.DURATION, "stiefel_job_duration_seconds", "From the first claim to the end")
    totals = {(row.name, row.label): row.value for row in seen.counters}
    for name, text, label, values in _LABELLED:
        family = CounterMetricFamily(f"stiefel_{name}", text, labels=[label])
        for value in values:
            family.add_metric([value], totals.get((name, value), 0))
        yield family
    lost = totals.get(("leases_expired", ""), 0)
    yield CounterMetricFamily("stiefel_leases_expired", "Workers lost in the middle of a job", value=lost)


def _storage(of_workers: Mapping[str, Storage]) -> Iterable[Metric]:
    """Of each worker that is up: several may have the same file system."""
    size = GaugeMetricFamily(
        "stiefel_worker_storage_size_bytes", "Of the file system with a worker's run directories", labels=["worker"]
    )
    free = GaugeMetricFamily("stiefel_worker_storage_free_bytes", "What is left of it", labels=["worker"])
    for worker, storage in of_workers.items():
        size.add_metric([worker], storage.size)
        free.add_metric([worker], storage.free)
    yield from (size, free)


def _histogram(seen: fleet.Fleet, histogram: counters.Histogram, name: str, text: str) -> Metric:
    rows = {row.label: row.value for row in seen.counters if row.name == histogram.name}
    buckets, so_far = [], 0.0
    for bound in histogram.labels():
        so_far += rows.get(bound, 0.0)
        buckets.append((bound, so_far))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=rows.get(counters.SUM, 0.0))


def _jobs(jobs: Iterable[Job]) -> Iterable[Metric]:
    jobs = list(jobs)
    labels = ["job_id", "method"]
    info = GaugeMetricFamily("stiefel_job_info", "What a job is; always 1", labels=[*labels, "name", "state", "model"])
    step = GaugeMetricFamily("stiefel_job_step", "Optimizer steps done", labels=labels)
    ratio = GaugeMetricFamily("stiefel_job_progress_ratio", "Steps done of all steps, 0 to 1", labels=labels)
    for job in jobs:
        model = job.spec["model"]
        named = str(model.get("preset") or model.get("hub") or model.get("path"))
        info.add_metric([job.id, job.method, job.name or "", job.state, named], 1)
        step.add_metric([job.id, job.method], job.step)
        ratio.add_metric([job.id, job.method], job.step / job.steps)
    yield from (info, step, ratio)
    for kind, table, otherwise in (
        (GaugeMetricFamily, _FIGURES, None),
        (CounterMetricFamily, _TOTALS, None),
        (CounterMetricFamily, _INCIDENTS, 0),
    ):
        for name, text, key in table:
            family = kind(f"stiefel_job_{name}", text, labels=labels)
            for job in jobs:
                value = job.figures.get(key, otherwise)
                if value is not None:
                    family.add_metric([job.id, job.method], value)
            yield family
