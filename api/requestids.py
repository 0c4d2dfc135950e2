"""Every answer carries an id, and so does all that is logged of it and of the job that it makes."""

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer import logs

access = logging.getLogger("stiefel.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
# Asked every few seconds, by machines.
PROBED = ("/healthz", "/readyz", "/metrics", "/metrics/api")


class RequestIds:
    """request.state.request_id is the client's own where that is one of letters, digits and -_.:, else a new one.

    The line in the access log is written when the answer begins: what is done after it keeps nobody waiting.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        began, begun = time.perf_counter(), False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
                _log(scope, message["status"], began)
            await send(message)

        with logs.about(request_id=request_id):
            try:
                await self._app(scope, receive, answer)
            finally:
                if not begun:  # whoever is around us answers for what has failed
                    _log(scope, 500, began)


def _log(scope: Scope, status: int, began: float) -> None:
    what = {"http_method": scope["method"], "path": quote(scope["path"], safe="/:@"), "status": status}
    seconds = round(time.perf_counter() - began, 4)
    level = logging.DEBUG if scope["path"] in PROBED else logging.INFO
    access.log(level, "%(http_method)s %(path)s %(status)d", what, extra=what | {"seconds": seconds})
