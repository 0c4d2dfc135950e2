"""One job through API, worker and trainer: found again by its ids in JSON logs, and as one trace by OpenTelemetry."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.system.service import Service, running

REQUEST_ID = "from-the-client.1"


@dataclass
class Collector:
    """What an OTLP collector receives: (service, span)."""

    url: str
    spans: list[tuple[str, Span]] = field(default_factory=list)

    def named(self, name: str) -> list[Span]:
        return [span for _, span in self.spans if span.name == name]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                made.spans.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Collector(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Service]:
    environment = {
        "STIEFEL_LOG_FORMAT": "json",
        "STIEFEL_TRACES": "otlp",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
    }
    with running(tmp_path_factory.mktemp("observed"), **environment) as started:
        yield started


@pytest.fixture(scope="module")
def job_id(service: Service) -> str:
    """One that has been trained, evaluated and saved."""
    service.http.headers["x-request-id"] = REQUEST_ID
    job_id = service.submit(checkpoints={"every": 5})
    del service.http.headers["x-request-id"]
    service.wait(job_id, "succeeded")
    return job_id


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def test_every_line_of_the_service_is_json(service: Service, job_id: str) -> None:
    for name in ("api", "worker-1", "reaper"):
        log = service.stack.home / "logs" / f"{name}.log"
        assert lines(log) == [json.loads(line) for line in log.read_text().splitlines()], name
        assert all({"timestamp", "level", "logger", "message"} <= set(line) for line in lines(log)), name


def test_a_job_is_found_by_its_request_in_api_worker_and_trainer(service: Service, job_id: str) -> None:
    logs = service.stack.home / "logs"
    queued, asked = (line for line in lines(logs / "api.log") if line.get("request_id") == REQUEST_ID)
    assert queued["job_id"] == job_id
    assert (asked["http_method"], asked["path"], asked["status"]) == ("POST", "/v1/jobs", 201)
    for log in (logs / "worker-1.log", service.rundir(job_id).log):
        ours = [line for line in lines(log) if line.get("job_id") == job_id]
        assert ours, log
        assert {(str(line["attempt"]), line["request_id"]) for line in ours} == {("1", REQUEST_ID)}
    steps = [line["event"] for line in lines(service.rundir(job_id).log) if line.get("event", {}).get("type") == "step"]
    assert steps[0]["loss"] > 0


def test_an_id_that_could_be_anything_else_is_not_taken_over(service: Service) -> None:
    answer = service.http.get("/healthz", headers={"x-request-id": "a b\tc"})
    assert answer.headers["x-request-id"].isalnum()


def test_a_job_is_one_trace(service: Service, job_id: str, collector: Collector) -> None:
    service.until(lambda: bool(collector.named("attempt")), "the spans")
    [submitted] = [span for _, span in collector.spans if span.name == "POST /v1/jobs"]
    [attempt], [train] = collector.named("attempt"), collector.named("train")
    inner = [span for name in ("evaluate", "checkpoint", "switch") for span in collector.named(name)]
    assert {span.name for span in inner} == {"evaluate", "checkpoint", "switch"}
    assert {span.trace_id for span in (attempt, train, *inner)} == {submitted.trace_id}
    assert attempt.parent_span_id == submitted.span_id
    assert train.parent_span_id == attempt.span_id
    assert {span.parent_span_id for span in inner} == {train.span_id}
    for span in inner:
        assert train.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    services = {span.name: service for service, span in collector.spans}
    assert services["POST /v1/jobs"] == "stiefel-api"
    assert (services["attempt"], services["train"]) == ("stiefel-worker", "stiefel-trainer")
    assert {a.key: a.value.string_value for a in attempt.attributes}["job_id"] == job_id


def test_a_line_of_the_trainer_names_its_span(service: Service, job_id: str, collector: Collector) -> None:
    service.until(lambda: bool(collector.named("train")), "the spans")
    [train] = collector.named("train")
    steps = [line for line in lines(service.rundir(job_id).log) if line.get("event", {}).get("type") == "step"]
    assert {line["span_id"] for line in steps} == {train.span_id.hex()}


def test_an_attempt_that_fails_is_an_error_in_its_trace(service: Service, collector: Collector) -> None:
    rate = {"learning_rate": 10.0, "warmup_steps": 0, "evaluate_every": 4}
    job_id = service.submit(method="full", optimisation=rate)
    service.until(lambda: service.job(job_id)["finished_at"] is not None, "its end")
    assert service.job(job_id)["error"]["code"] == "divergence"
    service.until(lambda: len(collector.named("attempt")) == 2, "the spans")
    failed = collector.named("attempt")[1]
    assert (failed.status.code, failed.status.message) == (Status.STATUS_CODE_ERROR, "divergence")
