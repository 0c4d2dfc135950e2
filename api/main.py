"""The API as an application; api/__main__.py serves it. Imports no torch."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from api import errors
from api.deps import Services
from api.generator import Generator
from api.limits import BodyLimit, Rates
from api.requestids import PROBED, RequestIds
from api.routes import files, generations, jobs, methods, models, operations, tuning, webhooks, workers
from api.times import HttpTimes
from jobs.database import Database
from jobs.filecheck import Checker
from jobs.metrics import BuildCollector
from jobs.queue import Doorbell
from jobs.results import Maker
from jobs.settings import Settings
from trainer import tracing

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
    app.add_middleware(HttpTimes, registry=registry)
    app.add_middleware(RequestIds)
    errors.install(app)
    for module in (jobs, files, tuning, models, generations, workers, methods, webhooks, operations):
        app.include_router(module.router)
    if tracing.provider() is not None:
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(
            app,
            tracer_provider=tracing.provider(),
            excluded_urls=",".join(f"{path}$" for path in PROBED),
            exclude_spans=["receive", "send"],
        )
    return app
