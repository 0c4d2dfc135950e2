"""How long answers take, counted in this process for Prometheus."""

import time
from collections.abc import Awaitable, Callable

from prometheus_client import CollectorRegistry, Histogram
from starlette.requests import Request
from starlette.responses import Response

_HTTP_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


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
