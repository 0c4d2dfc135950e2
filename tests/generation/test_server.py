"""The generator's own door, and the API's where there is no generator. Without a model."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from api.generator import Generator
from jobs.database import Database
from jobs.settings import Settings
from tests.api.local import local_client
from trainer.errors import SpecError
from trainer.generation import server
from trainer.generation.protocol import LINES, Began, Ended, Failed, Line, Piece, Task
from trainer.generation.server import Patience
from trainer.generation.speaker import Speaker
from trainer.generation.turns import Full, FullOfOne, Turn, Turns

SECRET = "0123456789abcdef"
TASK = {"model": {"type": "directory", "path": "/"}, "prompts": ["a", "b"]}


class Fake(Speaker):
    """Says these lines to every task."""

    def __init__(self, *lines: Line) -> None:
        super().__init__("cpu")
        self._lines = lines

    def answer(self, task: Task, turn: Turn, say: Callable[[Line], None]) -> None:
        for line in self._lines:
            say(line)


def ask(speaker: Speaker, body: Any = TASK, secret: str = SECRET) -> Any:
    with TestClient(server.create_app(SECRET, speaker, Patience(waiting=1))) as client:
        assert client.get("/healthz").json() == {"status": "ok", "model": None, "requests": 0}
        return client.post("/generate", json=body, headers={"authorization": f"Bearer {secret}"})


def test_a_task_is_answered_in_lines_until_all_its_choices_are_whole() -> None:
    lines = [Began(prompt_tokens=2), Piece(index=0, text="ü"), Ended(index=0, finish_reason="stop", tokens=1)]
    lines += [Piece(index=1, text="\n"), Ended(index=1, finish_reason="length", tokens=1)]
    answer = ask(Fake(*lines))
    assert [LINES.validate_json(line) for line in answer.text.splitlines()] == lines


def test_a_failure_is_the_last_line() -> None:
    assert ask(Fake(Failed(message="no"))).json() == {"type": "failed", "message": "no"}


@pytest.mark.parametrize("secret", ["", "0123456789abcdeg", "ü"])
def test_nobody_is_answered_without_the_secret(secret: str) -> None:
    with TestClient(server.create_app(SECRET, Fake(), Patience(waiting=1))) as client:
        header = f"Bearer {secret}".encode()
        assert client.post("/generate", json=TASK, headers=[(b"authorization", header)]).status_code == 401
        assert client.get("/openapi.json").status_code == 404


def test_a_server_without_a_secret_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server.SECRET, "short")
    with pytest.raises(SpecError, match="16 characters"):
        server.serve("127.0.0.1", 0, Fake(), Patience())


@contextmanager
def busy(turns: Turns, owner: str = "") -> Iterator[None]:
    """While somebody has the turn."""
    begun, release = threading.Event(), threading.Event()

    def work(_: Turn) -> None:
        begun.set()
        release.wait(20)

    turns.take(work, owner)
    assert begun.wait(20)
    yield
    release.set()


def test_those_who_wait_have_their_turn_in_order_unless_they_go() -> None:
    turns, had, done = Turns(waiting=2, per_owner=1), list[str](), threading.Event()
    with busy(turns):
        second = turns.take(lambda _: had.append("second"))
        turns.take(lambda _: had.append("third"))
        with pytest.raises(Full):
            turns.take(lambda _: had.append("fourth"))
        # Whoever goes makes room at once.
        turns.leave(second)
        turns.take(lambda _: done.set())
    assert done.wait(20)
    turns.close()
    assert had == ["third"]


def test_of_one_owner_few_may_wait_and_others_pass() -> None:
    turns, had, done = Turns(waiting=8, per_owner=3), list[str](), threading.Event()
    with busy(turns, "a"):
        for name in ("a1", "a2"):
            turns.take(lambda _, name=name: had.append(name), "a")
        with pytest.raises(FullOfOne):
            turns.take(lambda _: had.append("a3"), "a")
        for name in ("b1", "b2"):
            turns.take(lambda _, name=name: had.append(name), "b")
        turns.take(lambda _: had.append("c1"), "c")
        assert len(turns) == 6
    turns.take(lambda _: done.set())
    assert done.wait(20)
    turns.close()
    # By who came first, but never twice one after the other while somebody else waits.
    assert had == ["b1", "a1", "b2", "a2", "c1"]


class Patient(Fake):
    """Answers when it is let to."""

    def __init__(self) -> None:
        super().__init__(Began(prompt_tokens=0), Ended(index=0, finish_reason="stop", tokens=0))
        self.begun, self.release = threading.Event(), threading.Event()

    def answer(self, task: Task, turn: Turn, say: Callable[[Line], None]) -> None:
        self.begun.set()
        assert self.release.wait(20)
        super().answer(task, turn, say)


@contextmanager
def one_is_answered(patience: Patience) -> Iterator[Any]:
    """(client, what posts a task of one owner or another, the speaker to release, the first answer to come)."""
    speaker = Patient()
    with TestClient(server.create_app(SECRET, speaker, patience)) as client, ThreadPoolExecutor(1) as aside:

        def post(**changes: Any) -> Any:
            body = TASK | {"prompts": ["a"], "owner": "me"} | changes
            return client.post("/generate", json=body, headers={"authorization": f"Bearer {SECRET}"})

        first = aside.submit(post)
        assert speaker.begun.wait(20)
        yield client, post, speaker, first


def test_who_waits_too_long_is_told_so() -> None:
    with one_is_answered(Patience(waiting=8, per_owner=2)) as (client, post, speaker, first):
        assert post(seconds=0.05).json() == {"type": "late"}
        # It waits no longer, so that another may.
        assert client.get("/healthz").json()["requests"] == 1
        assert post(seconds=0.05).json() == {"type": "late"}
        speaker.release.set()
        # The first has begun, and is not cut off by its own time for waiting.
        assert [LINES.validate_json(line).type for line in first.result(20).text.splitlines()] == ["began", "ended"]


def test_too_many_of_one_owner_are_told_so() -> None:
    with one_is_answered(Patience(waiting=8, per_owner=1)) as (_, post, speaker, first):
        refused = post()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert post(owner="you", seconds=0.05).json() == {"type": "late"}
        speaker.release.set()
        assert first.result(20).status_code == 200


@pytest.mark.parametrize(
    ("answered", "status", "code"),
    [
        (httpx.Response(429, headers={"retry-after": "7"}), 429, "rate_limit_exceeded"),
        (httpx.Response(503, headers={"retry-after": "7"}), 503, "generator_busy"),
        (httpx.Response(200, text='{"type": "late"}\n'), 503, "generator_busy"),
    ],
)
def test_the_api_passes_on_that_others_are_first(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, answered: httpx.Response, status: int, code: str
) -> None:
    changes = {"generator_url": "http://generator", "generator_secret": SECRET, "generator_seconds": 9.0}
    asked: list[dict[str, Any]] = []

    def generator(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return answered

    client_of_api = httpx.AsyncClient(transport=httpx.MockTransport(generator))
    monkeypatch.setattr(Generator, "_client", client_of_api)
    with local_client(settings.model_copy(update=changes)) as client:
        answer = client.post("/v1/completions", json={"model": "/some/model", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert int(answer.headers["retry-after"]) > 0
    assert "x-should-retry" not in answer.headers
    assert asked[0]["seconds"] == 9.0


def test_without_a_generator_the_api_says_how_to_start_one(settings: Settings, database: Database) -> None:
    with local_client(settings) as client:
        answer = client.post("/v1/completions", json={"model": "/some/model", "prompt": "x"})
    assert answer.status_code == 501
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert error["code"] == "no_generator"
    assert "python -m trainer serve" in error["message"] and "vLLM" in error["message"]
