"""A real Prometheus beside a running service, with compose's scrape jobs and our rules, says what REST says.

Skipped where there is no `prometheus` (Debian's package of that name).
"""

import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cli.stack import Stack
from tests.deploy.panels import FILES, dashboard, queries
from tests.system.service import QUICK, Service
from trainer.process import free_port

PROMETHEUS = shutil.which("prometheus")
ROOT = Path(__file__).parents[2]
SECONDS = 60.0

pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: prometheus)")

# Panels without data here: ranks on CPUs have neither a known peak of FLOPs nor memory of an accelerator.
EMPTY = {"Model FLOPs utilisation", "Peak of an accelerator"}


class Prometheus:
    def __init__(self, http: httpx.Client) -> None:
        self.http, self.began = http, time.time()

    def ask(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of each series, now."""
        result = self._get("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, expression: str) -> float:
        ((_, value),) = self.ask(expression)
        return value

    def history(self, expression: str) -> list[float]:
        """Every value that is a number, of all series, since the beginning."""
        now = time.time()
        start = now - math.ceil(now - self.began)  # in whole steps, so that the last one is now
        result = self._get("query_range", query=expression, start=start, end=now, step=1)["result"]
        values = [float(value) for series in result for _, value in series["values"]]
        return [value for value in values if math.isfinite(value)]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"still waiting for {what}"
            time.sleep(0.2)

    def _get(self, path: str, **parameters: Any) -> dict[str, Any]:
        answer = self.http.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return dict(answer["data"])


@contextmanager
def scraping(directory: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """compose's configuration, quicker, without a key, and with `targets` by scrape job."""
    config = yaml.safe_load((ROOT / "compose" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "helm" / "stiefel" / "rules" / "*.yaml")]
    assert {job["job_name"] for job in config["scrape_configs"]} == targets.keys()
    for job in config["scrape_configs"]:
        job.pop("authorization", None)
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    directory.mkdir()
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    assert PROMETHEUS is not None
    flags = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    # It ends with this process, however that ends.
    command = [sys.executable, "-m", "trainer.child", str(os.getpid()), PROMETHEUS, *flags]
    with (directory / "log").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdout=output,
            stderr=output,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=20) as http:
            prometheus = Prometheus(http)
            prometheus.until(lambda: _ready(process, directory, http), "Prometheus")
            yield prometheus
    finally:
        process.terminate()
        process.wait(20)


def _ready(process: "subprocess.Popen[bytes]", directory: Path, http: httpx.Client) -> bool:
    assert process.poll() is None, (directory / "log").read_text()
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.ConnectError:
        return False


def test_prometheus_says_of_a_running_service_what_rest_says(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "home", port=0, metrics_port=free_port(), environment=QUICK)
    with stack, httpx.Client(base_url=stack.api_url, timeout=20) as http:
        service = Service(stack, http)
        targets = {"stiefel-exporter": f"127.0.0.1:{stack.metrics_port}", "stiefel-api": f"127.0.0.1:{stack.port}"}
        with scraping(tmp_path / "prometheus", targets) as prometheus:
            prometheus.until(lambda: len(prometheus.ask("up == 1")) == 2, "both targets")
            prometheus.until(lambda: prometheus.ask("stiefel_workers_up == 1") != [], "the worker")
            trained, failed = _one_that_ends_well_and_one_that_fails(service, tmp_path)
            seen = f'stiefel_job_info{{job_id="{failed}", state="failed"}}'
            prometheus.until(lambda: prometheus.ask(seen) != [], "the second job's end")
            # The rules are evaluated once a second too.
            prometheus.until(
                lambda: prometheus.ask('reason:stiefel_attempt_failures:increase1h{reason="bad_data"} > 0') != [],
                "the failure's increase",
            )
            _figures_are_those_of_rest(prometheus, service, trained)
            _waits_and_failures_are_those_of_rest(prometheus, service, [trained, failed])
            _every_rule_works_and_no_alert_fires(prometheus)
            assert _panels_without_data(prometheus) == EMPTY
            _a_lost_worker_is_told(prometheus, service)


def _one_that_ends_well_and_one_that_fails(service: Service, tmp_path: Path) -> tuple[str, str]:
    trained = service.submit(optimisation={"steps": 150})
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' * 200 + "{not json\n")
    data = {"source": "jsonl", "files": [str(tmp_path / "bad.jsonl")], "sequence_length": 16}
    failed = service.submit(dataset=data)
    service.wait(trained, "succeeded")
    service.wait_until(failed, lambda job: job["state"] == "failed")
    return trained, failed


def _figures_are_those_of_rest(prometheus: Prometheus, service: Service, job_id: str) -> None:
    job, curve = service.job(job_id), service.curve(job_id)
    figures = job["figures"]
    evaluations = service.http.get(f"/v1/jobs/{job_id}/metrics").json()["evaluations"]
    expected = {
        "train_loss": curve[-1][1],
        "evaluation_loss": evaluations[-1]["loss"],
        "step": job["progress"]["step"],
        "progress_ratio": 1.0,
        "tokens_per_second": figures["tokens_per_second"],
        "tokens_total": 150 * 4 * 64,
        "optimizer_state_bytes": figures["optimizer_state_bytes"],
    }
    for name, value in expected.items():
        assert prometheus.value(f'stiefel_job_{name}{{job_id="{job_id}"}}') == pytest.approx(value), name
    # While it ran, Prometheus saw some of the curve's points, and none that was not on it.
    losses = {loss for _, loss in curve}
    seen = prometheus.history(f'stiefel_job_train_loss{{job_id="{job_id}"}}')
    assert losses.issuperset(seen)
    assert len(set(seen)) > 1
    assert max(prometheus.history("fleet:stiefel_job_tokens:rate5m")) > 0


def _waits_and_failures_are_those_of_rest(prometheus: Prometheus, service: Service, job_ids: list[str]) -> None:
    jobs = [service.job(job_id) for job_id in job_ids]
    waits = [job["attempts"][0]["started_at"] - job["created_at"] for job in jobs]
    assert prometheus.value("stiefel_queue_wait_seconds_sum") == pytest.approx(sum(waits), abs=0.05)
    assert prometheus.value("stiefel_queue_wait_seconds_count") == len(waits)
    bounds = [float(labels["le"]) for labels, _ in prometheus.ask("stiefel_queue_wait_seconds_bucket")]
    longest = prometheus.value("fleet:stiefel_queue_wait_seconds:p95_5m")
    # A quantile of a histogram lies in the bucket of what it is a quantile of.
    above = min(bound for bound in bounds if bound >= max(waits))
    below = max(bound for bound in [0.0, *bounds] if bound < above)
    assert below <= longest <= above

    codes = Counter(attempt["error"]["code"] for job in jobs for attempt in job["attempts"] if attempt["error"])
    counted = prometheus.ask("stiefel_attempt_failures_total > 0")
    assert {labels["reason"]: value for labels, value in counted} == codes == {"bad_data": 1}
    states = Counter(job["state"] for job in service.http.get("/v1/jobs").json()["data"])
    by_state = prometheus.ask("sum by (state) (stiefel_jobs) > 0")
    assert {labels["state"]: value for labels, value in by_state} == states == {"succeeded": 1, "failed": 1}


def _every_rule_works_and_no_alert_fires(prometheus: Prometheus) -> None:
    rules = prometheus.rules()
    assert len(rules) > 40
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


def _panels_without_data(prometheus: Prometheus) -> set[str]:
    asked = [(title, query) for file in FILES for title, _, query in queries(dashboard(file))]
    assert len(asked) > 40
    return {title for title, query in asked if not prometheus.history(query)}


def _a_lost_worker_is_told(prometheus: Prometheus, service: Service) -> None:
    """A worker that is gone with its job: the lease runs out, and the alert fires."""
    job_id = service.submit(optimisation={"steps": 5000})
    service.wait_for_step(job_id, 1)
    service.stack.kill("worker-1")
    prometheus.until(
        lambda: prometheus.ask('ALERTS{alertname="StiefelLeaseExpired", alertstate="firing"}') != [], "the alert"
    )
    (told,) = [rule["alerts"][0]["annotations"] for rule in prometheus.rules() if rule["name"] == "StiefelLeaseExpired"]
    assert told["description"].startswith("1 leases have run out")
