"""The API as an application; api/__main__.py serves it. Imports no torch."""

import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import quote

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from api import errors
from api.deps import Services
from api.generator import Generator
from api.limits import BodyLimit, Rates
from api.routes import files, generations, jobs, methods, models, operations, tuning, webhooks, workers
from api.times import HttpTimes
from jobs.database import Database
from jobs.filecheck import Checker
from jobs.metrics import BuildCollector
from jobs.queue import Doorbell
from jobs.results import Maker
from jobs.settings import Settings
from trainer import logs, tracing

access = logging.getLogger("stiefel.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
# Asked every few seconds, by machines.
_PROBED = ("/healthz", "/readyz", "/metrics", "/metrics/api")

DESCRIPTION = """
Training of large language models on little memory: POST a job, watch it, scrape it.

Errors have one shape, `{"error": {"message", "type", "param", "code"}}`; `param` names the field to change.

Send an API key as `Authorization: Bearer sk-stiefel-…`; each sees its own jobs. An installation without API keys
(`STIEFEL_AUTH=off`) answers its own machine alone.
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or Settings()
    database = Database(settings.url)
    services = Services(
        settings,
        database,
        Doorbell(settings),
        Rates(settings),
        Generator(settings),
        Checker(database, settings),
    )

    maker = Maker(database, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        services.checker.start()
        maker.start()
        yield
        services.checker.close()
        maker.close()
        services.database.close()

    app = FastAPI(title="Stiefel", version="0.1.0", description=DESCRIPTION, lifespan=lifespan)
    registry = CollectorRegistry()
    registry.register(BuildCollector())
    app.state.services, app.state.registry = services, registry
    app.add_middleware(BodyLimit, most=settings.max_body_bytes)
    app.middleware("http")(HttpTimes(registry))
    app.middleware("http")(_request_id)
    errors.install(app)
    for module in (jobs, files, tuning, models, generations, workers, methods, webhooks, operations):
        app.include_router(module.router)
    if tracing.provider() is not None:
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(
            app,
            tracer_provider=tracing.provider(),
            excluded_urls=",".join(f"{path}$" for path in _PROBED),
            exclude_spans=["receive", "send"],
        )
    return app


async def _request_id(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Every answer carries an id, and so does all that is logged of it and of the job that it makes.

    It is the client's own where that is one of letters, digits and -_.:, else a new one.
    """
    given = request.headers.get("x-request-id", "")
    request.state.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    began, status = time.perf_counter(), 500
    with logs.about(request_id=request.state.request_id):
        try:
            response = await call_next(request)
            status = response.status_code
        finally:
            what = {"http_method": request.method, "path": quote(request.url.path, safe="/:@"), "status": status}
            seconds = round(time.perf_counter() - began, 4)
            level = logging.DEBUG if request.url.path in _PROBED else logging.INFO
            text = "%(http_method)s %(path)s %(status)d"
            access.log(level, text, what, extra=what | {"seconds": seconds})
    response.headers["x-request-id"] = request.state.request_id
    return response
