"""The API as an application: uvicorn --factory api.main:create_app. Imports no torch."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from api import errors
from api.deps import Services
from api.limits import BodyLimit, Rates
from api.routes import jobs, methods, operations, workers
from api.times import HttpTimes
from jobs.database import Database
from jobs.metrics import BuildCollector
from jobs.queue import Doorbell
from jobs.settings import Settings

DESCRIPTION = """
Training of large language models on little memory: POST a job, watch it, scrape it.

Errors have one shape, `{"error": {"message", "type", "param", "code"}}`; `param` names the field to change.

Send an API key as `Authorization: Bearer sk-stiefel-…`; each sees its own jobs. An installation without API keys
(`STIEFEL_AUTH=off`) answers its own machine alone.
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or Settings()
    services = Services(settings, Database(settings.url), Doorbell(settings), Rates(settings))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        services.database.close()

    app = FastAPI(title="Stiefel", version="0.1.0", description=DESCRIPTION, lifespan=lifespan)
    registry = CollectorRegistry()
    registry.register(BuildCollector())
    app.state.services, app.state.registry = services, registry
    app.add_middleware(BodyLimit, most=settings.max_body_bytes)
    app.middleware("http")(HttpTimes(registry))
    app.middleware("http")(_request_id)
    errors.install(app)
    for module in (jobs, workers, methods, operations):
        app.include_router(module.router)
    return app


async def _request_id(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Every answer carries an id, the client's own or a new one; an error of the server's own is logged with it."""
    request.state.request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
    response = await call_next(request)
    response.headers["x-request-id"] = request.state.request_id
    return response
