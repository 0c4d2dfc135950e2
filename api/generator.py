"""Asking the generator (`python -m trainer serve`), and what becomes of its answers."""

from collections.abc import AsyncIterator
from contextlib import suppress
from functools import cached_property

import anyio
import httpx
from pydantic import ValidationError

from jobs.settings import Settings
from trainer.generation.protocol import LINES, Began, Failed, Late, Line, Refused, Task

# A model of some gigabytes is exported and loaded before the first line, and others may have their turn before.
_SECONDS = 1800.0
_TRY_AGAIN = "5"
_HOW = (
    "start one with `python -m trainer serve`, and name it in STIEFEL_GENERATOR_URL (`stiefel up` does). To serve a "
    "model for good, write it with `python -m trainer export` and give it to an inference server such as vLLM"
)


class GenerationError(Exception):
    """Root of the tree.

    ├── NoGenerator        this installation has none
    ├── GeneratorAway      it cannot be reached, or has ended
    ├── GeneratorBusy      too many wait already, or the turn did not come in time
    ├── GeneratorTaken     too many of the caller's own wait already
    ├── GenerationRefused  what is asked for cannot be done
    └── GenerationFailed   it went wrong
    """


class NoGenerator(GenerationError):
    def __init__(self) -> None:
        super().__init__(f"this installation has no generator to try models with: {_HOW}")


class GeneratorAway(GenerationError):
    def __init__(self, why: str) -> None:
        super().__init__(f"the generator cannot be reached at the moment ({why}); try again")


class GeneratorBusy(GenerationError):
    """`retry_after`: seconds, as the header has it."""

    def __init__(self, retry_after: str) -> None:
        self.retry_after = retry_after
        super().__init__(
            "the generator answers one request at a time, and others are before this one; try again, or serve an "
            "export with an inference server"
        )


class GeneratorTaken(GenerationError):
    """`retry_after`: seconds, as the header has it."""

    def __init__(self, retry_after: str) -> None:
        self.retry_after = retry_after
        super().__init__(
            "the generator answers one request at a time, and as many of this API key's wait as may; try again when "
            "one has been answered, or serve an export with an inference server"
        )


class GenerationRefused(GenerationError):
    def __init__(self, line: Refused) -> None:
        self.param, self.code = line.param, line.code
        super().__init__(line.message)


class GenerationFailed(GenerationError):
    pass


class Generator:
    def __init__(self, settings: Settings) -> None:
        self._url = settings.generator_url.rstrip("/")
        self._secret = settings.generator_secret

    async def ask(self, task: Task) -> "Answering":
        """Once it is this task's turn. Raises GenerationError."""
        if not self._url:
            raise NoGenerator
        request = self._client.build_request(
            "POST",
            f"{self._url}/generate",
            content=task.model_dump_json(),
            headers={"authorization": f"Bearer {self._secret}", "content-type": "application/json"},
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise GeneratorAway(f"{type(error).__name__} at {self._url}") from error
        answering = Answering(response)
        try:
            if response.status_code == 429:
                raise GeneratorTaken(response.headers.get("retry-after", _TRY_AGAIN))
            if response.status_code == 503:
                raise GeneratorBusy(response.headers.get("retry-after", _TRY_AGAIN))
            if response.status_code != 200:
                await response.aread()
                raise GenerationFailed(f"the generator answers {response.status_code}: {response.text[:500]}")
            await answering.begin()
        except BaseException:
            await answering.close()
            raise
        return answering

    @cached_property
    def _client(self) -> httpx.AsyncClient:
        # Nothing is kept between two requests, and no proxy asked: it is the next process, or the next pod.
        limits = httpx.Limits(max_keepalive_connections=0)
        timeout = httpx.Timeout(5.0, read=_SECONDS)
        return httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)


class Answering:
    """One answer on its way. To be closed, which ends it at the generator too."""

    began: Began

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._lines = self._parsed()

    async def begin(self) -> None:
        first = await anext(self._lines)
        if not isinstance(first, Began):
            raise GenerationFailed(f"the generator began with {first.type!r}")
        self.began = first

    async def lines(self) -> AsyncIterator[Line]:
        """`began` first. Raises GenerationError."""
        yield self.began
        async for line in self._lines:
            yield line

    async def close(self) -> None:
        # Also where the client's departure has cancelled everything around.
        with anyio.CancelScope(shield=True), suppress(httpx.HTTPError):
            await self._response.aclose()

    async def _parsed(self) -> AsyncIterator[Line]:
        try:
            async for text in self._response.aiter_lines():
                line = LINES.validate_json(text)
                if isinstance(line, Refused):
                    raise GenerationRefused(line)
                if isinstance(line, Late):
                    raise GeneratorBusy(_TRY_AGAIN)
                if isinstance(line, Failed):
                    raise GenerationFailed(f"the model could not answer: {line.message}")
                yield line
        except (httpx.HTTPError, ValidationError) as error:
            raise GeneratorAway(f"it broke off: {type(error).__name__}") from error
