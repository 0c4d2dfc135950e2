"""A run as spans of a trace: the run itself, and what its events say took long. Imports no torch.

The one that reports, rank 0, does this; where traces are off, nothing.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from trainer import events, logs, tracing

log = logging.getLogger("stiefel.trainer")


@contextmanager
def of_run() -> Iterator[None]:
    """Within the trace that the environment names, if any. No run ends because nobody can trace it."""
    if os.environ.get(tracing.TRACES, "off") == "off" or os.environ["RANK"] != "0":
        yield
        return
    try:
        tracing.start("trainer", "otlp")
    except tracing.TracingError as error:
        log.warning("%s", error)
        yield
        return
    try:
        with tracing.span("train", os.environ.get(tracing.TRACEPARENT) or None, **logs.current()):
            yield
    finally:
        # A process of ranks is left without its interpreter's own end.
        tracing.flush()


def show(event: events.Event) -> None:
    match event:
        case events.Switched():
            tracing.past("switch", event.seconds, step=event.step)
        case events.Evaluated():
            tracing.past("evaluate", event.seconds, step=event.step, loss=event.loss)
        case events.Checkpointed():
            tracing.past("checkpoint", event.seconds, step=event.step, bytes=event.bytes)
