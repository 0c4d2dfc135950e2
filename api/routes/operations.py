"""For operators: /metrics, /healthz, /readyz."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse

from api.answers import documented
from api.auth import Scraper
from api.deps import Given
from api.prometheus import FleetCollector
from jobs import fleet
from jobs.queue import BROKER_ERRORS

router = APIRouter(tags=["operations"])


class Readiness(BaseModel):
    status: Literal["ok", "unready"]
    database: str = Field(description="ok, or away and why")
    broker: str


@router.get(
    "/metrics",
    response_class=Response,
    responses=documented(401, 403, 413, 429, 503) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def prometheus(request: Request, given: Given, caller: Scraper) -> Response:
    """Text format of Prometheus: the fleet, the caller's running and recently ended jobs, this API's requests."""
    seen = CollectorRegistry()
    seen.register(FleetCollector(given, caller.sees))
    text = generate_latest(seen) + generate_latest(request.app.state.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


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
