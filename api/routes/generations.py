"""/v1/chat/completions and /v1/completions: what a model says, to try it out. Not an inference server."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import anyio
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from api.answers import documented
from api.asked import DEFAULT_COMPLETION_TOKENS, Asked, ChatRequest, CompletionRequest
from api.auth import Writer
from api.deps import Given
from api.generator import Answering, GenerationError
from api.said import Chat, ChatCompletion, Text, TextCompletion, usage_of
from jobs.speaking import place_of
from trainer.generation.protocol import Ended, Line, Piece, Task

log = logging.getLogger("stiefel.api")

router = APIRouter(
    prefix="/v1", tags=["trying models out"], responses=documented(400, 401, 403, 404, 413, 429, 500, 501, 503)
)

_ABOUT = {
    "stiefel-notice": "for trying models out; to serve one, run `python -m trainer export` and an inference server"
}
T = TypeVar("T")


@router.post("/chat/completions", response_model=ChatCompletion)
async def chat(given: Given, caller: Writer, asked: ChatRequest, http: Request) -> Response:
    """Answer to messages, by the chat template of the model.

    One answer at a time in the whole installation, for comparing a model before and after: to serve one, write it with
    `python -m trainer export` and give it to an inference server such as vLLM. A parameter of OpenAI's that is not
    listed here is refused, not ignored.
    """
    place = await run_in_threadpool(place_of, given.database, given.settings, caller, asked.model)
    task = Task(
        model=place,
        messages=tuple(message.plain() for message in asked.messages),
        choices=asked.choices,
        sampling=asked.sampling(asked.max_completion_tokens or asked.max_tokens),
        owner=caller.owner,
        seconds=given.settings.generator_seconds,
    )
    return await _answer(given, task, asked, Chat(asked.model), http)


@router.post("/completions", response_model=TextCompletion)
async def complete(given: Given, caller: Writer, asked: CompletionRequest, http: Request) -> Response:
    """Text behind a prompt. As /v1/chat/completions, for models without a chat template above all."""
    place = await run_in_threadpool(place_of, given.database, given.settings, caller, asked.model)
    sampling = asked.sampling(asked.max_tokens or DEFAULT_COMPLETION_TOKENS)
    task = Task(
        model=place,
        prompts=asked.prompts,
        choices=asked.choices,
        sampling=sampling,
        owner=caller.owner,
        seconds=given.settings.generator_seconds,
    )
    return await _answer(given, task, asked, Text(asked.model), http)


async def _answer(given: Given, task: Task, asked: Asked, form: Chat, http: Request) -> Response:
    answering = await _unless_gone(http, given.generator.ask(task))
    if answering is None:
        return _gone()
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return _Events(answering, _chunks(answering, form, usage))
    try:
        lines = await _unless_gone(http, _all(answering))
    finally:
        await answering.close()
    return _gone() if lines is None else JSONResponse(form.whole(lines).model_dump(), headers=_ABOUT)


async def _all(answering: Answering) -> list[Line]:
    return [line async for line in answering.lines()]


async def _chunks(answering: Answering, form: Chat, include_usage: bool) -> AsyncIterator[str]:
    lines: list[Line] = []
    begun: set[int] = set()
    nothing_yet = {"usage": None} if include_usage else {}
    try:
        async for line in answering.lines():
            lines.append(line)
            if not isinstance(line, Piece | Ended):
                continue
            first = form.first(line.index) if line.index not in begun else None
            begun.add(line.index)
            if first is not None:
                yield _event(form.head | {"choices": [first]} | nothing_yet)
            choice = form.piece(line) if isinstance(line, Piece) else form.last(line)
            yield _event(form.head | {"choices": [choice]} | nothing_yet)
    except GenerationError as error:
        log.warning("a stream broke off: %s", error)
        yield _event({"error": {"message": str(error), "type": "server_error", "param": None, "code": "broken_off"}})
        return
    if include_usage:
        yield _event(form.head | {"choices": [], "usage": usage_of(lines).model_dump()})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, object]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _Events(StreamingResponse):
    """Ends the answer at the generator when the client goes away, at whatever moment."""

    def __init__(self, answering: Answering, chunks: AsyncIterator[str]) -> None:
        # A proxy that collects what it passes on would make one piece of it.
        headers = _ABOUT | {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answering.close()


async def _unless_gone(http: Request, doing: Awaitable[T]) -> T | None:
    """What comes of it, or None when the client went away meanwhile: then it is cancelled."""
    found: list[T] = []
    failed: list[GenerationError] = []
    async with anyio.create_task_group() as group:

        async def do() -> None:
            try:
                found.append(await doing)
            except GenerationError as error:
                # Not as one of a group.
                failed.append(error)
            group.cancel_scope.cancel()

        group.start_soon(do)
        while (await http.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()
    if failed:
        raise failed[0]
    return found[0] if found else None


def _gone() -> Response:
    """Nobody reads it; the log shows what it was (nginx's status)."""
    return Response(status_code=499)
