"""Traces by OpenTelemetry's SDK, where an installation asks for them: STIEFEL_TRACES=otlp. Imports no torch.

Where to and how is for OpenTelemetry's own variables to say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, …). One
job is one trace: the request that submitted it, each attempt of a worker, and in it the trainer with its evaluations,
checkpoints and switches. Until `start` has been called nothing is imported and nothing costs anything.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Literal

TRACES = "STIEFEL_TRACES"
# As OpenTelemetry passes a trace on to a child process.
TRACEPARENT = "TRACEPARENT"

_NANOSECONDS = 1_000_000_000
_PATIENCE_SECONDS = 3.0
_tracer: Any = None
_provider: Any = None


class TracingError(Exception):
    """The packages are not there."""


def check(traces: Literal["off", "otlp"]) -> None:
    """Whether `start` will do. Raises TracingError."""
    if traces != "off":
        _packages()


def start(service: str, traces: Literal["off", "otlp"]) -> None:
    """Of this whole process; again, in a child that was forked. Off is nothing. Raises TracingError."""
    global _tracer, _provider
    if traces == "off":
        return
    exporter, resources, sdk, export = _packages()
    about = {"service.name": f"stiefel-{service}", "service.version": version("stiefel")}
    _provider = sdk.TracerProvider(resource=resources.Resource.create(about))
    # A collector that is away is not waited for as long as the exporter would by itself.
    patience = float(os.environ.get("OTEL_EXPORTER_OTLP_TIMEOUT", _PATIENCE_SECONDS))
    _provider.add_span_processor(export.BatchSpanProcessor(exporter.OTLPSpanExporter(timeout=patience)))
    _tracer = _provider.get_tracer("stiefel")


def _packages() -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http import trace_exporter
        from opentelemetry.sdk import resources, trace
        from opentelemetry.sdk.trace import export
    except ImportError as error:
        raise TracingError(
            f"{TRACES}=otlp needs {error.name}: pip install 'stiefel[tracing]', or set it to off"
        ) from error
    return trace_exporter, resources, trace, export


def provider() -> Any:
    """For instrumentation of other packages; None while traces are off."""
    return _provider


@contextmanager
def span(name: str, parent: str | None = None, **attributes: str | int | float) -> Iterator[Any]:
    """Around what happens within; None while traces are off. `parent`: a traceparent, else the span around this one."""
    if _tracer is None:
        yield None
        return
    with _tracer.start_as_current_span(name, context=_context(parent), attributes=attributes) as made:
        yield made


def past(name: str, seconds: float, **attributes: str | int | float) -> None:
    """What took so long and ended just now, within the present span."""
    if _tracer is not None:
        ended = time.time_ns()
        made = _tracer.start_span(name, start_time=ended - int(seconds * _NANOSECONDS), attributes=attributes)
        made.end(ended)


def failed(reason: str) -> None:
    """The present span is about something that failed."""
    if _tracer is not None:
        from opentelemetry.trace import Status, StatusCode, get_current_span

        get_current_span().set_status(Status(StatusCode.ERROR, reason))


def traceparent() -> str | None:
    """Of the present span, for whoever goes on with its trace."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def flush() -> None:
    """Send what has ended: before a process leaves, or long after it last did. Whoever calls has better things to do
    than to wait for a collector that is away."""
    if _provider is not None:
        sending = threading.Thread(target=_provider.force_flush, daemon=True)
        sending.start()
        sending.join(_PATIENCE_SECONDS)


def _context(parent: str | None) -> Any:
    if parent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent})
