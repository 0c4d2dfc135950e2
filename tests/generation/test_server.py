"""The generator's own door, and the API's where there is no generator. Without a model."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from jobs.database import Database
from jobs.settings import Settings
from tests.api.local import local_client
from trainer.errors import SpecError
from trainer.generation import server
from trainer.generation.protocol import LINES, Began, Ended, Failed, Line, Piece, Task
from trainer.generation.speaker import Speaker
from trainer.generation.turns import Full, Turn, Turns

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
    with TestClient(server.create_app(SECRET, speaker, waiting=1, idle=600)) as client:
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
    with TestClient(server.create_app(SECRET, Fake(), waiting=1, idle=600)) as client:
        header = f"Bearer {secret}".encode()
        assert client.post("/generate", json=TASK, headers=[(b"authorization", header)]).status_code == 401
        assert client.get("/openapi.json").status_code == 404


def test_a_server_without_a_secret_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server.SECRET, "short")
    with pytest.raises(SpecError, match="16 characters"):
        server.serve("127.0.0.1", 0, "cpu", 1, 1)


def test_those_who_wait_have_their_turn_in_order_unless_they_go() -> None:
    turns, had = Turns(waiting=3), list[str]()
    release, done = threading.Event(), threading.Event()
    turns.take(lambda _: None if release.wait(20) else had.append("first"))
    second = turns.take(lambda _: had.append("second"))
    turns.take(lambda _: had.append("third"))
    turns.take(lambda _: done.set())
    with pytest.raises(Full):
        turns.take(lambda _: had.append("fifth"))
    second.gone.set()
    release.set()
    assert done.wait(20)
    turns.close()
    assert had == ["third"]


def test_without_a_generator_the_api_says_how_to_start_one(settings: Settings, database: Database) -> None:
    with local_client(settings) as client:
        answer = client.post("/v1/completions", json={"model": "/some/model", "prompt": "x"})
    assert answer.status_code == 501
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert error["code"] == "no_generator"
    assert "python -m trainer serve" in error["message"] and "vLLM" in error["message"]
