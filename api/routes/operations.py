"""For operators: /metrics, /metrics/api, /healthz, /readyz."""

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse

from api.answers import documented
from api.auth import Scraper
from api.deps import Given
from jobs import fleet
from jobs.metrics import FleetCollector
from jobs.queue import BROKER_ERRORS

router = APIRouter(tags=["operations"])


class Readiness(BaseModel):
    status: Literal["ok", "unready"]
    database: str = Field(description="ok, or away and why")
    broker: str


_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/metrics", response_class=Response, responses=documented(401, 403, 413, 429, 503) | _TEXT)
def everything(request: Request, given: Given, caller: Scraper) -> Response:
    """Text format of Prometheus: the fleet, the caller's running and recently ended jobs, this API's requests.

    Where the reaper exports the fleet (`python -m jobs.reaper --metrics-port`), scrape that, and /metrics/api here.
    """
    seen = CollectorRegistry()
    seen.register(FleetCollector(given.database, given.settings, caller.sees))
    return _text(generate_latest(seen) + generate_latest(request.app.state.registry))


@router.get("/metrics/api", response_class=Response, responses=documented(401, 403, 413, 429, 503) | _TEXT)
def this_process(request: Request, _: Scraper) -> Response:
    """Text format of Prometheus: the requests to this process of the API alone."""
    return _text(generate_latest(request.app.state.registry))


@router.get("/healthz", responses=documented(413))
def alive() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/readyz", response_model=Readiness, responses=documented(413) | {503: {"model": Readiness}})
def ready(given: Given) -> JSONResponse:
    """The database answers: 200, else 503. A broker that is away is told, but jobs are accepted all the same.

    A broker that is silent makes this take about two seconds: give a probe more than that.
    """
    database = broker = "ok"
    try:
        fleet.ping(given.database)
    except SQLAlchemyError as error:
        database = f"away: {type(error).__name__}"
    try:
        given.doorbell.waiting([given.settings.queue])
    except BROKER_ERRORS as error:
        broker = f"away: {type(error).__name__}"
    status = 200 if database == "ok" else 503
    return JSONResponse(
        {"status": "ok" if status == 200 else "unready", "database": database, "broker": broker}, status
    )


def _text(metrics: bytes) -> Response:
    return Response(metrics, media_type=CONTENT_TYPE_LATEST)
