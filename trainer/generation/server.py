"""python -m trainer serve: a process that answers tasks, one at a time. protocol.py has what is said.

It opens whatever directory it is told to: who may know the secret decides what may be named (the API does, by its rules
of access). So it listens on the loopback interface unless told otherwise, and has no other way in.
"""

import asyncio
import hmac
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from trainer.errors import SpecError
from trainer.generation.protocol import Late, Line, Task
from trainer.generation.speaker import Speaker
from trainer.generation.turns import Full, FullOfOne, Turns

SECRET = "STIEFEL_GENERATOR_SECRET"
# A text of a few hundred tokens takes about so long.
_TRY_AGAIN = "5"
_LAST_LINES = ("ended", "refused", "late", "failed")


@dataclass(frozen=True)
class Patience:
    """Requests that wait besides the one that is answered; of all of these, those of one owner; seconds without a
    question after which a model is forgotten."""

    waiting: int = 8
    per_owner: int = 3
    idle: float = 600


def serve(host: str, port: int, speaker: Speaker, patience: Patience) -> None:
    """Until SIGTERM or Ctrl-C. Raises SpecError without a secret."""
    secret = os.environ.get(SECRET, "")
    if len(secret) < 16:
        raise SpecError(f"{SECRET}: give 16 characters or more, and the same to the API")
    app = create_app(secret, speaker, patience)
    # Whoever still listens when it ends is cut off; texts can be asked for again.
    uvicorn.run(app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=2)


def create_app(secret: str, speaker: Speaker, patience: Patience) -> FastAPI:
    turns = Turns(patience.waiting, patience.per_owner)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(_tidy(turns, speaker, patience.idle))
        yield
        tidying.cancel()
        await asyncio.to_thread(turns.close)

    app = FastAPI(title="Stiefel's generator", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    def healthz() -> dict[str, object]:
        return {"status": "ok", "model": speaker.holds, "requests": len(turns)}

    @app.post("/generate")
    async def generate(task: Task, request: Request) -> Response:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {secret}".encode()):
            return JSONResponse({"detail": f"the bearer token is not this server's {SECRET}"}, 401)
        loop, lines = asyncio.get_running_loop(), asyncio.Queue[Line]()

        def say(line: Line) -> None:
            # Nobody is left to tell where the loop has ended.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(lines.put_nowait, line)

        try:
            turn = turns.take(lambda turn: speaker.answer(task, turn, say), task.owner)
        except FullOfOne:
            return _full(429, f"{patience.per_owner} requests of this owner are under way or wait, and no more may")
        except Full:
            return _full(503, f"{len(turns)} requests are under way or wait, and no more may")

        def give_up() -> None:
            if turns.withdraw(turn):
                lines.put_nowait(Late())

        giving_up = loop.call_later(task.seconds, give_up)

        def leave() -> None:
            giving_up.cancel()
            turns.leave(turn)

        choices = task.choices * (len(task.prompts) if task.messages is None else 1)
        return _Lines(_until_last(lines, choices), leave)

    return app


def _full(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, {"retry-after": _TRY_AGAIN})


class _Lines(StreamingResponse):
    """Calls `leave` at its end, which is when the client goes away, at whatever moment."""

    def __init__(self, lines: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _until_last(lines: "asyncio.Queue[Line]", choices: int) -> AsyncIterator[str]:
    open_choices = choices
    while open_choices > 0:
        line = await lines.get()
        yield line.model_dump_json() + "\n"
        if line.type in _LAST_LINES:
            open_choices -= 1 if line.type == "ended" else choices


async def _tidy(turns: Turns, speaker: Speaker, idle: float) -> None:
    while True:
        await asyncio.sleep(idle / 4)
        with suppress(Full):  # which is not idle
            turns.take(lambda _: speaker.forget_if_idle(idle))
