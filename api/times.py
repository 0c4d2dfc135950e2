"""How long answers take to begin, counted in this process for Prometheus."""

import time

from prometheus_client import CollectorRegistry, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HTTP_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


class HttpTimes:
    """Latency by route template: the template, because a path with an id would make a series per job."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._seconds = Histogram(
            "stiefel_http_request_seconds",
            "Time to answer, by route",
            ["method", "route", "status"],
            registry=registry,
            buckets=(0.005, 0.01, 0.03, 0.1, 0.3, 1, 3),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, begun = time.perf_counter(), False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._count(scope, message["status"], began)
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            if not begun:
                self._count(scope, 500, began)

    def _count(self, scope: Scope, status: int, began: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _HTTP_METHODS else "other"
        self._seconds.labels(method, route, str(status)).observe(time.perf_counter() - began)
