"""The API as OpenAI's client sees it: a server on a port of this machine, the client unmodified, requests counted."""

import hashlib
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn

from api.main import create_app
from jobs import filestore
from jobs.database import Database, clock
from jobs.settings import Settings
from jobs.tables import StoredFile


class Served:
    """`asked` has (method, path) of each request; the next ones are answered by `answers`, where there are any."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.app = settings, create_app(settings)
        self.asked: list[tuple[str, str]] = []
        self.clients: list[openai.OpenAI] = []
        self.lost = 0  # answers that are still to be lost on their way

    def client(self, api_key: str = "none", **options: Any) -> openai.OpenAI:
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, **options))
        return self.clients[-1]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.asked.append((scope["method"], scope["path"]))
        lose, self.lost = self.lost > 0, max(0, self.lost - 1)

        async def sent(message: Any) -> None:
            if lose and message["type"] == "http.response.start":
                message = message | {"status": 503, "headers": [(b"retry-after-ms", b"1")]}
            await send(message)

        await self.app(scope, receive, sent)

    url = ""


@contextmanager
def served(settings: Settings) -> Iterator[Served]:
    application = Served(settings)
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    application.url = f"http://127.0.0.1:{port}"
    try:
        yield application
    finally:
        for client in application.clients:
            client.close()
        server.should_exit = True
        thread.join()


def upload(database: Database, settings: Settings, owner: str = "", examples: int = 4, **changes: Any) -> str:
    """A file as an upload leaves it, already looked at."""
    data = "".join(json.dumps({"text": f"example {number}"}) + "\n" for number in range(examples)).encode()
    with database.transaction() as session:
        columns = {
            "id": f"file-{secrets.token_hex(12)}",
            "owner": owner,
            "filename": "examples.jsonl",
            "purpose": "fine-tune",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "created_at": clock(session),
            "status": "processed",
            "columns": {},
            "format": "text",
            "examples": examples,
            "statistics": {},
        }
        file = StoredFile(**(columns | changes))
        session.add(file)
    path = filestore.local_path(settings, file)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return file.id


def typed(answer: openai.BaseModel) -> None:
    """Every field of OpenAI's type is there, and of the type that it has, all the way down."""
    _check(type(answer), json.loads(answer.to_json()), type(answer).__name__)


def _check(model: Any, given: dict[str, Any], where: str) -> None:
    missing = {name for name in model.model_fields if name not in given} - _LEFT_OUT
    assert not missing, f"{where} has no {missing}"
    # The one state that OpenAI's type does not list, though its client asks for it.
    model.model_validate(given | ({"status": "queued"} if given.get("status") == "paused" else {}))


# Of the other kinds of methods; of a model that is not going away.
_LEFT_OUT = {"dpo", "reinforcement", "shutdown_date"}
