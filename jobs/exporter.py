"""The metrics of fleet and jobs over HTTP, without API keys, from beside the reaper: for Prometheus alone.

/metrics    the database's figures, and when upkeep last succeeded
/healthz    200 while the reaper's rounds go on, whatever they meet; 503 when one hangs
"""

import logging
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app

from jobs.database import Database
from jobs.metrics import BuildCollector, FleetCollector
from jobs.settings import Settings

log = logging.getLogger("stiefel.metrics")

# A round asks the database and the broker several times; each may take its time limits to answer.
_LONGEST_ROUND_SECONDS = 180.0


class Rounds:
    """What the reaper says of itself."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended = clock()
        self._success = Gauge(
            "stiefel_upkeep_last_success_timestamp_seconds",
            "When the reaper last finished a round in which database and broker answered; at first, when it began",
            registry=registry,
        )
        self._success.set_to_current_time()

    def ended(self, well: bool) -> None:
        self._ended = self._clock()
        if well:
            self._success.set_to_current_time()

    @property
    def go_on(self) -> bool:
        return self._clock() - self._ended < _LONGEST_ROUND_SECONDS


class _Server(ThreadingMixIn, WSGIServer):
    """A scrape that waits for a silent database must not keep the health check waiting."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)


class Exporter:
    """Answers at `host`:`port` (0: a free one) from a thread of its own, from `start` to `close`."""

    def __init__(self, database: Database, settings: Settings, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(FleetCollector(database, settings))
        registry.register(BuildCollector())
        self.rounds = Rounds(registry)
        self._metrics = make_wsgi_app(registry)
        self._server = make_server(host, port, self._answer, _Server, _Quiet)

    @property
    def port(self) -> int:
        return self._server.server_port

    def start(self) -> None:
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environment["PATH_INFO"]
        if path == "/metrics":
            metrics: Iterable[bytes] = self._metrics(environment, start)
            return metrics
        if path == "/healthz":
            status, text = ("200 OK", "ok") if self.rounds.go_on else ("503 Service Unavailable", "the reaper hangs")
        else:
            status, text = "404 Not Found", "here are /metrics and /healthz"
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]
