"""Prometheus metrics: jobs and fleet from the database at each scrape, HTTP requests counted in this process.

One prefix, base units. Labels of a job's series are job_id and method; everything else about it is on stiefel_job_info.
"""

import time
from collections.abc import Awaitable, Callable, Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from api.deps import Services
from jobs import counters, fleet
from jobs.tables import Job

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


_HTTP_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


class FleetCollector(Collector):
    """`of`: whose jobs have series of their own; None for everybody's."""

    def __init__(self, services: Services, of: str | None) -> None:
        self._services, self._of = services, of

    def describe(self) -> Iterable[Metric]:
        return []  # else registering would ask the database

    def collect(self) -> Iterable[Metric]:
        seen = fleet.snapshot(self._services.database, self._services.settings, self._of)
        yield from _fleet(seen)
        yield from _jobs(seen.jobs)


def _fleet(seen: fleet.Fleet) -> Iterable[Metric]:
    jobs = GaugeMetricFamily("stiefel_jobs", "Jobs by state and method", labels=["state", "method"])
    for (state, method), number in seen.jobs_by_state.items():
        jobs.add_metric([state, method], number)
    yield jobs
    depth = sum(number for (state, _), number in seen.jobs_by_state.items() if state == "queued")
    yield GaugeMetricFamily("stiefel_queue_depth", "Jobs that wait for a worker", value=depth)
    yield GaugeMetricFamily(
        "stiefel_queue_oldest_seconds", "How long the oldest of them has waited", value=seen.oldest_queued_seconds
    )
    yield GaugeMetricFamily(
        "stiefel_jobs_unschedulable", "Queued jobs that no worker that is up could take", value=seen.unschedulable
    )
    yield GaugeMetricFamily("stiefel_workers_drained", "Workers that take no new job", value=seen.workers_drained)
    yield GaugeMetricFamily("stiefel_workers_up", "Workers heard of lately", value=seen.workers_up)
    yield GaugeMetricFamily("stiefel_workers_busy", "Jobs under a valid lease", value=seen.workers_busy)
    yield GaugeMetricFamily(
        "stiefel_jobs_not_exported", "Running or recent jobs left out of the series per job", value=seen.jobs_left_out
    )
    slots = GaugeMetricFamily(
        "stiefel_device_slots", "GPUs and CPU slots of the workers that are up", labels=["device", "state"]
    )
    for device in ("gpu", "cpu"):
        for state in ("busy", "idle"):
            slots.add_metric([device, state], seen.devices.get((device, state), 0))
    yield slots
    yield _histogram(seen, counters.QUEUE_WAIT, "stiefel_queue_wait_seconds", "From queued to claimed")
    yield _histogram(seen, counters.DURATION, "stiefel_job_duration_seconds", "From the first claim to the end")
    families = {
        "jobs_finished": ("stiefel_jobs_finished", "Jobs that ended, by state", "state"),
        "attempt_failures": ("stiefel_attempt_failures", "Attempts that failed, by class of failure", "reason"),
        "leases_expired": ("stiefel_leases_expired", "Workers lost in the middle of a job", None),
    }
    for counter, (name, text, label) in families.items():
        family = CounterMetricFamily(name, text, labels=[label] if label else [])
        rows = [row for row in seen.counters if row.name == counter]
        for row in rows:
            family.add_metric([row.label] if label else [], row.value)
        if not rows and label is None:
            family.add_metric([], 0)
        yield family


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
    for kind, table in ((GaugeMetricFamily, _FIGURES), (CounterMetricFamily, _TOTALS)):
        for name, text, key in table:
            family = kind(f"stiefel_job_{name}", text, labels=labels)
            for job in jobs:
                if job.figures.get(key) is not None:
                    family.add_metric([job.id, job.method], job.figures[key])
            yield family


class HttpTimes:
    """Latency by route template: the template, because a path with an id would make a series per job."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "stiefel_http_request_seconds",
            "Time to answer, by route",
            ["method", "route", "status"],
            registry=registry,
            buckets=(0.005, 0.01, 0.03, 0.1, 0.3, 1, 3),
        )

    async def __call__(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        began = time.perf_counter()
        status = 500
        try:
            response = await call_next(request)
            status = response.status_code
        finally:
            route = getattr(request.scope.get("route"), "path", "unmatched")
            method = request.method if request.method in _HTTP_METHODS else "other"
            self._seconds.labels(method, route, str(status)).observe(time.perf_counter() - began)
        return response
