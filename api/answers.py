"""Every refusal in one shape.

{"error": {"message": "…", "type": "invalid_request_error", "param": "method.rank", "code": "invalid_value"}}
"""

from fastapi.responses import JSONResponse
from pydantic import BaseModel


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """What every status of 400 and above carries."""

    error: ErrorBody


def answer(status: int, message: str, kind: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    body = ErrorAnswer(error=ErrorBody(message=message, type=kind, param=param, code=code))
    # A refusal that will be the same next time must not be retried by clients that retry on their own.
    headers = {"x-should-retry": "false"} if status < 500 else {}
    return JSONResponse(body.model_dump(), status, headers)


_MEANINGS = {
    400: "Something in the request is wrong; `param` names it",
    401: "No valid API key",
    403: "The API key has not the scope, or what is asked for lies outside of what the installation allows",
    404: "There is no such thing, or it is not the caller's",
    408: "The body stopped coming; send it again",
    409: "The state of the thing does not allow it, or an Idempotency-Key came with another body",
    413: "The body is too large",
    429: "Too many requests (Retry-After says when to try again), or a quota is used up",
    500: "It went wrong here; the log says how",
    501: "This installation has no generator; the message says how to start one",
    503: "The database, or the generator, cannot be reached at the moment, or is busy; try again",
}


def documented(*statuses: int) -> dict[int | str, dict[str, object]]:
    """For a route's OpenAPI description."""
    return {status: {"model": ErrorAnswer, "description": _MEANINGS[status]} for status in statuses}
