"""How much may be asked: requests a minute, wrong keys a minute, bytes of a body.

Rates are counted in each API process by itself: an exact count would need the broker, and requests are answered without
it.
"""

import math
import time

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.answers import answer
from jobs.settings import Settings


class TooManyRequests(Exception):
    """`retry_after`: whole seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"{message}; try again in {retry_after} s")


class Rates:
    def __init__(self, settings: Settings) -> None:
        self._window = MovingWindowRateLimiter(MemoryStorage())
        self._requests = RateLimitItemPerMinute(settings.requests_per_minute)
        self._wrong_keys = RateLimitItemPerMinute(settings.failed_keys_per_minute)

    def count_request(self, owner: str) -> None:
        """Raises TooManyRequests."""
        if not self._window.hit(self._requests, "request", owner):
            raise self._refusal(self._requests, "request", owner, "more than {} requests a minute with this API key")

    def count_wrong_key(self, address: str) -> None:
        self._window.hit(self._wrong_keys, "wrong key", address)

    def check_address(self, address: str) -> None:
        """Raises TooManyRequests where it has guessed too often."""
        if not self._window.test(self._wrong_keys, "wrong key", address):
            raise self._refusal(self._wrong_keys, "wrong key", address, "more than {} wrong API keys a minute")

    def _refusal(self, item: RateLimitItem, kind: str, who: str, message: str) -> TooManyRequests:
        seconds = self._window.get_window_stats(item, kind, who).reset_time - time.time()
        return TooManyRequests(message.format(item.amount), max(1, math.ceil(seconds)))


class BodyLimit:
    """Answers 413 to a larger body, announced or not, before anything looks at it."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        size, messages = int(announced) if announced.isdigit() else 0, list[Message]()
        while size <= self._most:
            message = await receive()
            messages.append(message)
            size = sum(len(part.get("body", b"")) for part in messages)
            if not message.get("more_body", False):
                break
        if size > self._most:
            message_text = f"the body is larger than {self._most:,} bytes, the most that is taken here"
            await answer(413, message_text, "invalid_request_error", code="too_large")(scope, receive, send)
            return
        rest = iter(messages)

        async def replay() -> Message:
            return next(rest, None) or await receive()

        await self._app(scope, replay, send)
