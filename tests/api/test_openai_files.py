"""/v1/files as the unmodified openai client sees it, over a real connection to a process of its own."""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from jobs import files, keys, submission
from jobs.keys import Quotas, Scope
from jobs.requests import JobRequest
from tests.api.forms import CHAT, FILE, PURPOSE, lines
from tests.api.served import Served, serving
from tests.conftest import job_body

MOST = 101 * 2**20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), auth="on", max_file_bytes=MOST) as opened:
        yield opened


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """100 MB in eight examples."""
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        for _ in range(8):
            file.write(b'{"text": "' + secrets.token_hex(6_250_000).encode() + b'"}\n')
    return path


def test_the_life_of_a_file(served: Served) -> None:
    client = served.client()
    content = lines(CHAT, CHAT, CHAT)
    file = client.files.create(
        file=("train.jsonl", content),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.id.startswith("file-")
    assert (file.object, file.filename, file.bytes, file.purpose) == ("file", "train.jsonl", len(content), "fine-tune")
    assert file.expires_at == file.created_at + 3600
    done = client.files.wait_for_processing(file.id, poll_interval=0.1)
    assert (done.status, done.status_details) == ("processed", None)
    assert client.files.retrieve(file.id).to_dict()["examples"] == 3
    assert client.files.content(file.id).read() == content
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(file.id)
    assert (caught.value.param, caught.value.code) == ("file_id", "not_found")


def test_columns_go_into_the_body(served: Served) -> None:
    content = lines({"question": "1 + 1?", "answer": "2"})
    columns = {"prompt": "question", "completion": "answer"}
    file = served.client().files.create(file=content, purpose="fine-tune", extra_body={"columns": columns})
    assert file.model_extra is not None
    assert (file.status, file.model_extra["format"], file.model_extra["columns"]) == ("processed", "prompt", columns)


def test_what_is_wrong_is_in_the_details(served: Served) -> None:
    client = served.client()
    file = client.files.create(file=("x.jsonl", b'{"text": 1}\n'), purpose="fine-tune")
    done = client.files.wait_for_processing(file.id, poll_interval=0.1)
    assert (done.status, done.status_details) == ("error", "line 1: text is 1, not a string")


def test_pages_follow_one_another(served: Served) -> None:
    client = served.client()
    made = [client.files.create(file=lines(CHAT), purpose="fine-tune").id for _ in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    assert [file.id for file in client.files.list(purpose="fine-tune", after=made[1], order="asc")] == made[2:]
    assert list(client.files.list(purpose="batch")) == []


def test_refusals_are_the_clients_own_exceptions_and_are_not_tried_again(served: Served, large: Path) -> None:
    client = served.client()
    needed = client.files.create(file=lines(CHAT), purpose="fine-tune")
    job = submission.create(served.database, served.settings, JobRequest.model_validate(job_body()))
    with served.database.transaction() as session:
        files.need(session, job.id, [needed.id], None)
    os.truncate(large, MOST + 1)
    before = served.asked("POST /v1/files"), served.asked(f"DELETE /v1/files/{needed.id}")
    with pytest.raises(openai.BadRequestError) as bad:
        client.files.create(file=lines(CHAT), purpose="vision")
    assert (bad.value.param, bad.value.code) == ("purpose", "invalid_value")
    with pytest.raises(openai.APIStatusError) as too_large, large.open("rb") as file:
        client.files.create(file=file, purpose="fine-tune")
    assert (too_large.value.status_code, too_large.value.param) == (413, "file")
    with pytest.raises(openai.AuthenticationError), large.open("rb") as file:
        served.with_key("sk-stiefel-no").files.create(file=file, purpose="fine-tune")
    with pytest.raises(openai.RateLimitError) as full, large.open("rb") as file:
        served.client(Quotas(storage_bytes=1000)).files.create(file=file, purpose="fine-tune")
    assert full.value.type == "insufficient_quota"
    with pytest.raises(openai.ConflictError) as conflict:
        client.files.delete(needed.id)
    assert (conflict.value.code, job.id in conflict.value.message) == ("file_needed", True)
    after = served.asked("POST /v1/files"), served.asked(f"DELETE /v1/files/{needed.id}")
    assert (after[0] - before[0], after[1] - before[1]) == (4, 1)
    assert not list((served.settings.files / "incoming").iterdir())


def test_100_mb_are_taken_and_given_without_being_held(served: Served, large: Path) -> None:
    client = served.client()
    client.files.create(file=lines(CHAT), purpose="fine-tune")
    before = served.memory("VmHWM")
    with large.open("rb") as content:
        file = client.files.create(file=content, purpose="fine-tune")
    assert (file.bytes, file.status) == (large.stat().st_size, "uploaded")
    assert file.bytes > 100e6
    assert client.files.wait_for_processing(file.id, poll_interval=0.2).status == "processed"
    with client.files.with_streaming_response.content(file.id) as answer, large.open("rb") as content:
        for piece in answer.iter_bytes(2**20):
            assert piece == content.read(len(piece))
        assert not content.read()
    client.files.delete(file.id)
    assert served.memory("VmHWM") - before < 32 * 2**20


def test_a_client_that_goes_away_leaves_nothing(served: Served) -> None:
    kept = served.kept()
    _, key = keys.create(served.database, "somebody", [Scope.WRITE], Quotas())
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: x\r\ncontent-type: multipart/form-data; boundary=edge\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: 50000000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + PURPOSE + FILE[:-30] + b"x" * 5_000_000)
        deadline = time.monotonic() + 30
        while not (arriving := [p for p in served.kept() if p not in kept]) or not arriving[0].stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    while served.kept() != kept:
        assert time.monotonic() < deadline
        time.sleep(0.01)
