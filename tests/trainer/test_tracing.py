"""Traces cost nobody anything: without a collector, without the packages, or switched off."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.test_command import make, trainer
from trainer import events, tracing

SPANS = """
import time
from trainer import tracing
tracing.start("test", "otlp")
for _ in range(1500):
    with tracing.span("one"):
        pass
began = time.monotonic()
tracing.flush()
print(time.monotonic() - began)
"""


def test_a_silent_collector_is_waited_for_three_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", SPANS],
            env=os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
            capture_output=True,
            text=True,
            check=True,
        )
    assert float(done.stdout) < 5


def test_switched_off_a_span_is_nothing() -> None:
    with tracing.span("one", step=1) as made:
        assert made is None
        assert tracing.traceparent() is None
    tracing.past("two", 1.0)
    tracing.failed("three")
    tracing.flush()


def test_a_run_that_nobody_can_trace_is_trained_all_the_same(tmp_path: Path) -> None:
    """OpenTelemetry is an extra; whether it is there is no user's fault."""
    rundir = make(tmp_path, "untraced")
    environment = os.environ | {tracing.TRACES: "otlp", "PYTHONPATH": without_opentelemetry(tmp_path)}
    done = subprocess.run(trainer("run", str(rundir.root)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "STIEFEL_TRACES=otlp needs opentelemetry" in done.stderr
    assert isinstance(list(events.read(rundir.events))[-1], events.Finished)


@pytest.mark.parametrize("module", ["worker", "api"])
def test_a_service_that_was_told_to_trace_and_cannot_says_so_at_the_start(module: str, tmp_path: Path) -> None:
    told = {"STIEFEL_TRACES": "otlp", "STIEFEL_HOME": str(tmp_path), "PYTHONPATH": without_opentelemetry(tmp_path)}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=os.environ | told, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"{module}: STIEFEL_TRACES=otlp needs opentelemetry" in done.stderr


def without_opentelemetry(directory: Path) -> str:
    """A place to look for packages in first, where its SDK cannot be imported."""
    place = directory / "without"
    place.mkdir()
    hook = "import sys\nsys.modules['opentelemetry.sdk'] = None\nsys.modules['opentelemetry.exporter'] = None\n"
    (place / "sitecustomize.py").write_text(hook)
    return str(place)
