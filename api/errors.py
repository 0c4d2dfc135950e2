"""The one table of HTTP statuses: which error becomes which answer."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from sqlalchemy.exc import DataError as DatabaseDataError
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from api.answers import answer
from api.auth import NotPermitted, Unauthenticated
from api.generator import (
    GenerationError,
    GenerationRefused,
    GeneratorAway,
    GeneratorBusy,
    GeneratorTaken,
    NoGenerator,
)
from api.limits import TooManyRequests
from api.uploads import BadUpload
from jobs.errors import (
    FileDamaged,
    FileNeeded,
    FilesInUse,
    FileUnknown,
    Forbidden,
    IdempotencyReused,
    JobNotFound,
    ModelInUse,
    ModelNotFound,
    NotChecked,
    NotDelivered,
    QuotaExceeded,
    Refused,
    StoreAway,
    TuningJobNotFound,
    UnknownCursor,
    WebhookNotFound,
    WorkerNotFound,
    WrongState,
)
from trainer.config import describe, problems
from trainer.errors import DataError, SpecError

log = logging.getLogger("stiefel.api")


# What a refusal that needs no more than its own words becomes: (status, type, param, code).
_REFUSALS: dict[type[Exception], tuple[int, str, str | None, str]] = {
    UnknownCursor: (400, "invalid_request_error", "after", "invalid_value"),
    NotPermitted: (403, "permission_error", None, "not_permitted"),
    JobNotFound: (404, "not_found_error", "job_id", "not_found"),
    TuningJobNotFound: (404, "not_found_error", "fine_tuning_job_id", "not_found"),
    ModelNotFound: (404, "not_found_error", "model", "model_not_found"),
    WebhookNotFound: (404, "not_found_error", "webhook_endpoint_id", "not_found"),
    NotDelivered: (409, "conflict_error", None, "not_delivered"),
    FileUnknown: (404, "not_found_error", "file_id", "not_found"),
    WorkerNotFound: (404, "not_found_error", "name", "not_found"),
    ModelInUse: (409, "conflict_error", None, "model_in_use"),
    WrongState: (409, "conflict_error", None, "wrong_state"),
    FileNeeded: (409, "conflict_error", None, "file_needed"),
    IdempotencyReused: (409, "conflict_error", "Idempotency-Key", "idempotency_key_reused"),
    QuotaExceeded: (429, "insufficient_quota", None, "quota_exceeded"),
}


def _refused(_: Request, error: Exception) -> JSONResponse:
    status, kind, param, code = _REFUSALS[type(error)]
    return answer(status, str(error), kind, param, code)


def install(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(_body_problems(error))

    @app.exception_handler(ValidationError)
    def unresolved(_: Request, error: ValidationError) -> JSONResponse:
        # A request whose parts are right one by one, and do not go together.
        return _invalid(problems(error))

    @app.exception_handler(SpecError)
    @app.exception_handler(DataError)
    def unusable(_: Request, error: Exception) -> JSONResponse:
        # Preflight's messages begin with the field that is to be changed.
        param = str(error).partition(":")[0]
        return answer(400, str(error), "invalid_request_error", param, "invalid_value")

    for kind in _REFUSALS:
        app.add_exception_handler(kind, _refused)

    @app.exception_handler(Unauthenticated)
    def unauthenticated(_: Request, error: Unauthenticated) -> JSONResponse:
        response = answer(401, str(error), "authentication_error", None, "invalid_api_key")
        response.headers["www-authenticate"] = "Bearer"
        return response

    @app.exception_handler(Forbidden)
    def forbidden(_: Request, error: Forbidden) -> JSONResponse:
        return answer(403, str(error), "permission_error", error.field, "outside")

    @app.exception_handler(Refused)
    def refused(_: Request, error: Refused) -> JSONResponse:
        return answer(400, str(error), "invalid_request_error", error.field, error.code)

    @app.exception_handler(NotChecked)
    def not_checked(_: Request, error: NotChecked) -> JSONResponse:
        # A client that tries again on its own may find it checked.
        response = answer(409, str(error), "conflict_error", error.field, "file_not_checked")
        del response.headers["x-should-retry"]
        response.headers["retry-after"] = "5"
        return response

    @app.exception_handler(TooManyRequests)
    def too_many(_: Request, error: TooManyRequests) -> JSONResponse:
        response = answer(429, str(error), "rate_limit_error", None, "rate_limit_exceeded")
        del response.headers["x-should-retry"]
        response.headers["retry-after"] = str(error.retry_after)
        return response

    @app.exception_handler(GenerationError)
    def not_said(_: Request, error: GenerationError) -> JSONResponse:
        match error:
            case GenerationRefused(code="model_not_found"):
                return answer(404, str(error), "not_found_error", error.param, error.code)
            case GenerationRefused():
                return answer(400, str(error), "invalid_request_error", error.param, error.code)
            case GeneratorBusy():
                response = answer(503, str(error), "server_error", code="generator_busy")
                response.headers["retry-after"] = error.retry_after
            case GeneratorTaken():
                response = answer(429, str(error), "rate_limit_error", code="rate_limit_exceeded")
                del response.headers["x-should-retry"]
                response.headers["retry-after"] = error.retry_after
            case GeneratorAway():
                response = answer(503, str(error), "server_error", code="unavailable")
                response.headers["retry-after"] = "5"
            case _:
                status, code = (501, "no_generator") if isinstance(error, NoGenerator) else (500, "generation_failed")
                response = answer(status, str(error), "server_error", code=code)
                response.headers["x-should-retry"] = "false"
        return response

    @app.exception_handler(FilesInUse)
    def files_in_use(_: Request, error: FilesInUse) -> JSONResponse:
        response = answer(409, str(error), "conflict_error", None, "files_in_use")
        del response.headers["x-should-retry"]
        return response

    @app.exception_handler(BadUpload)
    def bad_upload(_: Request, error: BadUpload) -> JSONResponse:
        response = answer(error.status, str(error), "invalid_request_error", error.param, error.code)
        if error.status == 408:
            del response.headers["x-should-retry"]
            response.headers["connection"] = "close"
        return response

    @app.exception_handler(FileDamaged)
    def file_damaged(_: Request, error: FileDamaged) -> JSONResponse:
        log.error("%s", error)
        response = answer(503, str(error), "server_error", code="file_damaged")
        response.headers["x-should-retry"] = "false"
        return response

    @app.exception_handler(StoreAway)
    def store_away(_: Request, error: StoreAway) -> JSONResponse:
        log.warning("%s", error)
        response = answer(503, str(error), "server_error", code="unavailable")
        response.headers["retry-after"] = "5"
        return response

    @app.exception_handler(DatabaseDataError)
    def cannot_be_stored(_: Request, error: DatabaseDataError) -> JSONResponse:
        return answer(
            400, f"the database cannot hold this: {error.orig}", "invalid_request_error", code="invalid_value"
        )

    @app.exception_handler(OperationalError)
    @app.exception_handler(PoolTimeout)
    def database_away(_: Request, error: Exception) -> JSONResponse:
        log.warning("the database cannot be asked: %s", error)
        message = "the database cannot be reached at the moment; try again"
        response = answer(503, message, "server_error", code="unavailable")
        response.headers["retry-after"] = "5"
        return response

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = answer(error.status_code, message, kind, code=str(error.detail).lower().replace(" ", "_"))
        response.headers.update(error.headers or {})  # Allow, with 405
        return response

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        request_id = request.state.request_id
        # Outside of what knows the request's id.
        ids = {"request_id": request_id}
        log.exception("%s %s", request.method, request.url.path, exc_info=error, extra=ids)
        message = f"an error of the server's own; its log has the details under request {request_id}"
        response = answer(500, message, "server_error", code="internal")
        response.headers["x-request-id"] = request_id
        return response


def _invalid(found: list[tuple[str, str]]) -> JSONResponse:
    field, _ = found[0]
    message = "; ".join(f"{name}: {text}" if name else text for name, text in found)
    return answer(400, message, "invalid_request_error", field or None, "invalid_value")


def _body_problems(error: RequestValidationError) -> list[tuple[str, str]]:
    """FastAPI's errors, whose locations begin with body, query or path, in the words of `trainer.config`."""
    lines = error.errors()
    for line in lines:
        if line["type"] == "json_invalid":
            return [("", f"the body is not JSON: {line['ctx']['error']} at character {line['loc'][-1]}")]
    return describe([line | {"loc": line["loc"][1:]} for line in lines])
