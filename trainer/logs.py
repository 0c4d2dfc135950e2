"""Log lines, and what each belongs to: for people, or as JSON for programs. Imports no torch.

    text    2026-11-22 12:00:01,120 INFO stiefel.worker: trainer 4711 [job_id=job-… attempt=2 request_id=…]
    json    {"timestamp": …, "level": "INFO", "logger": "stiefel.worker", "message": "trainer 4711", "job_id": …, …}

The ids are those of `about` around the call, of the environment that a supervisor gave its trainer, and, where traces
are on, of the span.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, cast, get_args

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from trainer.errors import SpecError

Form = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

# How a supervisor tells its trainer; the ids by their names in a line.
FORM, LEVEL = "STIEFEL_LOG_FORMAT", "STIEFEL_LOG_LEVEL"
IDS = {"job_id": "STIEFEL_JOB", "attempt": "STIEFEL_ATTEMPT", "request_id": "STIEFEL_REQUEST"}

_of_process: dict[str, str | int] = {}
_ids: ContextVar[dict[str, str | int]] = ContextVar("ids")


@contextmanager
def about(**ids: str | int | None) -> Iterator[None]:
    """Every line from within belongs to these, and to what it belonged to before. None says nothing."""
    token = _ids.set(current() | {name: value for name, value in ids.items() if value is not None})
    try:
        yield
    finally:
        _ids.reset(token)


def current() -> dict[str, str | int]:
    return _of_process | _ids.get({})


def configure(form: Form, level: Level) -> None:
    """Of this whole process: to standard error."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_ids)
    if form == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(levelname)s %(name)s %(message)s",
                rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
                # uvicorn's, for terminals.
                reserved_attrs=[*RESERVED_ATTRS, "color_message"],
                timestamp=True,
            )
        )
    else:
        handler.setFormatter(_Text("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def configure_trainer() -> Form:
    """As the environment says; the answer is in which form. Raises SpecError."""
    form, level = os.environ.get(FORM, "text"), os.environ.get(LEVEL, "info")
    for name, value, known in ((FORM, form, get_args(Form)), (LEVEL, level, get_args(Level))):
        if value not in known:
            raise SpecError(f"{name}: {value!r} is none of {', '.join(known)}")
    configure(cast(Form, form), cast(Level, level))
    _of_process.update({name: os.environ[variable] for name, variable in IDS.items() if os.environ.get(variable)})
    if "attempt" in _of_process:
        _of_process["attempt"] = int(_of_process["attempt"])
    return cast(Form, form)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        known = {name: getattr(record, name, None) for name in IDS}
        ids = " ".join(f"{name}={value}" for name, value in known.items() if value is not None)
        line = super().format(record)
        # Behind the first line: a traceback follows it.
        first, *rest = line.split("\n")
        return "\n".join([f"{first} [{ids}]" if ids else first, *rest])


def _add_ids(record: logging.LogRecord) -> bool:
    for name, value in (_of_span() | current()).items():
        if not hasattr(record, name):
            setattr(record, name, value)
    return True


def _of_span() -> dict[str, str | int]:
    """Only where something has imported OpenTelemetry there can be a span."""
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}
