"""How much may be asked: requests a minute, wrong keys a minute, bytes of a body.

Rates are counted in each API process by itself: an exact count would need the broker, and requests are answered without
it.
"""

import ipaddress
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.answers import answer
from jobs.settings import Settings

_MINUTE = 60.0


class TooManyRequests(Exception):
    """`retry_after`: whole seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"{message}; try again in {retry_after} s")


class Window:
    """At most so many in any minute, of each of at most `remembered` names: of more, the longest quiet are forgotten.

    (Ready-made limiters that keep their counts in memory keep every name that they have ever seen.)
    """

    def __init__(self, most: int, remembered: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self._remembered, self._clock = most, remembered, clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._times)

    def count(self, name: str) -> float | None:
        """One more. Seconds until one more would be allowed, where this one is not; it does not count then."""
        with self._lock:
            at = self._clock()
            times = self._times.setdefault(name, deque())
            self._times.move_to_end(name)
            if len(self._times) > self._remembered:
                self._times.popitem(last=False)
            while times and times[0] <= at - _MINUTE:
                times.popleft()
            if len(times) >= self.most:
                return times[0] + _MINUTE - at
            times.append(at)
            return None


class Rates:
    def __init__(self, settings: Settings) -> None:
        self._requests = Window(settings.requests_per_minute)
        self._wrong_keys = Window(settings.failed_keys_per_minute)

    def count_request(self, owner: str) -> None:
        """Raises TooManyRequests."""
        _count(self._requests, owner, "requests a minute with this API key")

    def count_wrong_key(self, address: str) -> None:
        """Raises TooManyRequests where an address has guessed too often."""
        _count(self._wrong_keys, _network_of(address), "wrong API keys a minute")


def _count(window: Window, name: str, what: str) -> None:
    wait = window.count(name)
    if wait is not None:
        raise TooManyRequests(f"more than {window.most} {what}", max(1, math.ceil(wait)))


def _network_of(address: str) -> str:
    """Of IPv6 the /64, which one subscriber has whole."""
    try:
        return str(ipaddress.ip_network((address, 64 if ":" in address else 32), strict=False))
    except ValueError:
        return address


# Bodies that are taken as they come in, with a limit of their own.
_STREAMED = {("POST", "/v1/files")}


class BodyLimit:
    """Answers 413 to a larger body, announced or not, before anything looks at it."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope.get("method"), scope.get("path")) in _STREAMED:
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = announced.isdigit() and int(announced) > self._most
        size, messages, more = 0, list[Message](), not too_large
        while more:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            too_large = size > self._most
            more = message.get("more_body", False) and not too_large
        if too_large:
            message_text = f"the body is larger than {self._most:,} bytes, the most that is taken here"
            await answer(413, message_text, "invalid_request_error", code="too_large")(scope, receive, send)
            return
        rest = iter(messages)

        async def replay() -> Message:
            return next(rest, None) or await receive()

        await self._app(scope, replay, send)
