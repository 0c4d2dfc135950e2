"""What somebody with an API key may try: files of others, places of others, too much at once, secrets."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.limits import BodyLimit
from jobs.database import Database
from jobs.settings import Settings
from tests.api.local import Office, local_client
from tests.conftest import job_body
from trainer.process import free_port


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory that jobs may read, with a secret beside it."""
    (tmp_path / "secret.txt").write_text("a secret " * 1000)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    directory = tmp_path / "data"
    (directory / "deeper").mkdir(parents=True)
    (directory / "fine.txt").write_text("a sentence for everybody " * 1000)
    return directory


@pytest.fixture
def office(settings: Settings, database: Database, data: Path) -> Iterator[Office]:
    limits = {"readable": str(data), "writable": f"{data}/out s3://bucket/runs"}
    with Office(settings.model_copy(update=limits), database) as opened:
        yield opened


def text(*files: str) -> dict[str, Any]:
    return {"dataset": {"source": "text", "files": list(files), "sequence_length": 64}}


def refused(office: Office, body: dict[str, Any]) -> dict[str, Any]:
    whole = json.loads(json.dumps(job_body() | body).replace("{data}", str(office.settings.readable)))
    answer = office.client().post("/v1/jobs", json=whole)
    assert answer.status_code == 403, answer.text
    assert answer.headers["x-should-retry"] == "false"
    return dict(answer.json()["error"])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (text("/etc/passwd"), "dataset.files"),
        (text("{data}/fine.txt", "{data}/../secret.txt"), "dataset.files"),
        (text("{data}/deeper/../../secret.txt"), "dataset.files"),
        (text("/*/passwd"), "dataset.files"),
        (text("{data}/*/../../secret*"), "dataset.files"),
        (text("{data}-other/x.txt"), "dataset.files"),
        ({"model": {"path": "{data}/../secret"}}, "model.path"),
        ({"model": {"hub": "../secret"}, "tokenizer": "bytes"}, "model.hub"),
        ({"tokenizer": "/etc"}, "tokenizer"),
        (text("{data}/d*/*"), "dataset.files"),
        (text("{data}/**/**/x"), "dataset.files"),
        ({"dataset": {"source": "hub", "name": "/etc"}}, "dataset.name"),
        # Not of the hub: readers of whatever lies around them.
        ({"dataset": {"source": "hub", "name": "text"}}, "dataset.name"),
        ({"dataset": {"source": "hub", "name": "json"}}, "dataset.name"),
        ({"dataset": {"source": "hub", "name": "https://example.org/x.zip"}}, "dataset.name"),
    ],
)
def test_files_outside_of_what_may_be_read_are_refused(office: Office, body: dict[str, Any], field: str) -> None:
    error = refused(office, body)
    assert error["param"] == field
    assert error["code"] == "outside"
    assert "a secret" not in error["message"]


def test_what_may_be_read_is_taken(office: Office, data: Path) -> None:
    (data / "link.txt").symlink_to(data / "fine.txt")
    for pattern in ("fine.txt", "*.txt", "**/fine.txt"):
        answer = office.client().post("/v1/jobs", json=job_body() | text(f"{data}/{pattern}"))
        assert answer.status_code == 201, answer.text


def test_a_link_that_leads_outside_is_refused(office: Office, data: Path) -> None:
    (data / "link.txt").symlink_to(data.parent / "secret.txt")
    (data / "linked").symlink_to(data.parent / "secret")
    for body in (text(f"{data}/link.txt"), text(f"{data}/*.txt"), {"model": {"path": f"{data}/linked"}}):
        assert refused(office, body)["code"] == "outside"


@pytest.mark.parametrize(
    "url",
    [
        "file:///tmp",
        "file://{data}/out/../../elsewhere",
        "s3://bucket/runs/../others",
        "s3://bucket/runsandmore",
        "s3://other/runs",
        "gs://bucket/runs",
    ],
)
def test_places_outside_of_what_may_be_written_are_refused(office: Office, url: str) -> None:
    assert refused(office, {"checkpoints": {"url": url}})["param"] == "checkpoints.url"


def test_an_nvme_directory_elsewhere_is_refused(office: Office) -> None:
    nvme = {"zero_stage": 3, "offload": "nvme", "nvme_path": "/var/lib"}
    assert refused(office, {"deepspeed": nvme})["param"] == "deepspeed.nvme_path"


@pytest.mark.parametrize("url", ["s3://bucket/runs/a", "file://{data}/out", "file://{data}/out/b"])
def test_places_that_may_be_written_are_taken(office: Office, data: Path, url: str) -> None:
    body = job_body(checkpoints={"url": url.replace("{data}", str(data))})
    assert office.client().post("/v1/jobs", json=body).status_code == 201


@pytest.mark.parametrize("url", ["s3://key:word@bucket/x", "simplecache::s3://bucket/x", "zip://a::file:///etc"])
def test_credentials_and_chains_in_a_url_are_refused_without_being_repeated(
    settings: Settings, database: Database, url: str
) -> None:
    """Also where everything may be written: a spec is shown to whoever sees the job."""
    with local_client(settings) as client:
        answer = client.post("/v1/jobs", json=job_body(checkpoints={"url": url}))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "checkpoints.url"
        assert "key:word" not in answer.text


def test_a_body_in_very_many_pieces_takes_no_long_time() -> None:
    """As many looks as pieces, not as many as their square."""
    pieces, looks = 20_000, 0

    class Piece(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            nonlocal looks
            looks += 1
            return super().get(key, default)

    async def ask() -> None:
        received = iter([Piece(body=b"x", more_body=True)] * (pieces - 1) + [Piece(body=b"x", more_body=False)])

        async def app(scope: Any, receive: Any, send: Any) -> None:
            assert sum([len((await receive())["body"]) for _ in range(pieces)]) == pieces

        async def receive() -> Any:
            return next(received)

        await BodyLimit(app, 2**20)({"type": "http", "headers": []}, receive, receive)

    asyncio.run(ask())
    assert looks < 10 * pieces


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_before_it_is_read(
    settings: Settings, database: Database, chunked: bool
) -> None:
    small = settings.model_copy(update={"max_body_bytes": 2000})
    body = json.dumps(job_body() | {"name": "n" * 3000}).encode()
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for first in range(0, len(body), 100):
            sent += 1
            yield body[first : first + 100]

    with local_client(small) as client:
        content: Any = pieces() if chunked else body
        answer = client.post("/v1/jobs", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert "2,000 bytes" in answer.json()["error"]["message"]
        assert client.post("/v1/jobs", json=job_body()).status_code == 201


def test_secrets_are_in_no_answer_and_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a database and a broker that are away, which is when their addresses are likeliest to be told."""
    caplog.set_level(logging.DEBUG)
    port = free_port()
    away = Settings(
        home=tmp_path,
        auth="off",
        database_url=f"postgresql+psycopg://somebody:hush-database@127.0.0.1:{port}/none",
        redis_url=f"redis://:hush-broker@127.0.0.1:{port}/0",
    )
    with local_client(away) as client:
        answers = [client.get("/v1/jobs"), client.get("/readyz"), client.post("/v1/jobs", json=job_body())]
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    assert "cannot be asked" in caplog.text
    for text_ in (caplog.text, *(answer.text for answer in answers)):
        assert "hush" not in text_


def test_an_api_key_is_in_no_log(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    _, key = office.key()
    office.with_key(key).post("/v1/jobs", json=job_body())
    office.with_key(key + "x").get("/v1/jobs")
    assert "announced later" in caplog.text
    assert key.split("-", 3)[3] not in caplog.text
