"""For operators: /metrics, /healthz, /readyz."""

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse

from api.deps import Given
from jobs import fleet
from jobs.queue import BROKER_ERRORS

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=Response)
def prometheus(request: Request) -> Response:
    """Text format of Prometheus: the fleet, running and recently ended jobs, and this API's requests."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/healthz")
def alive() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/readyz")
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
        given.doorbell.waiting()
    except BROKER_ERRORS as error:
        broker = f"away: {type(error).__name__}"
    status = 200 if database == "ok" else 503
    return JSONResponse(
        {"status": "ok" if status == 200 else "unready", "database": database, "broker": broker}, status
    )
