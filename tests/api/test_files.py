"""/v1/files on SQLite and on PostgreSQL: what is taken, what is found in it, whose it is, when it goes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from jobs import files, submission, wishes
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.tables import StoredFile
from tests.api.forms import CHAT, END, FILE, FORM, PURPOSE, lines, part, settled, upload
from tests.api.local import Office, local_client
from tests.conftest import job_body


@pytest.fixture
def client(settings: Settings, database: Database) -> Iterator[TestClient]:
    with local_client(settings) as opened:
        yield opened


@pytest.fixture
def office(settings: Settings, database: Database) -> Iterator[Office]:
    with Office(settings, database) as opened:
        yield opened


def kept(settings: Settings) -> list[Path]:
    """Every file that the store has on this machine."""
    return sorted(path for path in settings.files.rglob("*") if path.is_file())


def needing(database: Database, settings: Settings, *file_ids: str) -> str:
    """A queued job that needs the files."""
    job = submission.create(database, settings, JobRequest.model_validate(job_body()))
    with database.transaction() as session:
        files.need(session, job.id, file_ids, None)
    return job.id


def test_a_file_is_as_openai_has_it_and_its_bytes_come_back(client: TestClient, settings: Settings) -> None:
    content = lines(CHAT, CHAT)
    file = upload(client, content)
    assert file["id"].startswith("file-")
    assert file | {"id": 0, "created_at": 0} == {
        "object": "file",
        "id": 0,
        "created_at": 0,
        "bytes": len(content),
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
        "expires_at": None,
        "sha256": hashlib.sha256(content).hexdigest(),
        "columns": {},
        "format": "chat",
        "examples": 2,
        "statistics": {
            "characters": 38,
            "characters_per_example": {"min": 19, "median": 19, "max": 19},
            "messages": 4,
            "roles": {"user": 2, "assistant": 2},
            # User:↵Which tree?↵↵Assistant:↵A larch.□↵↵
            "tokens": {
                "tokenizer": "bytes",
                "tokens": 2 * 41,
                "trained_tokens": 2 * 9,
                "shortest": 41,
                "median": 41,
                "longest": 41,
            },
        },
    }
    assert client.get(f"/v1/files/{file['id']}").json() == file
    answer = client.get(f"/v1/files/{file['id']}/content")
    assert answer.content == content
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{file['id']}").status_code == 404
    assert kept(settings) == []


def test_names_that_postgresql_cannot_hold_are_told_all_the_same(client: TestClient) -> None:
    file = upload(client, lines(*[{"a\0": n} for n in range(30)]))
    assert (file["status"], "and 20 more" in file["status_details"]) == ("error", True)
    file = upload(client, lines(*[{"text": "a\0", "label": "b\0"}] * 2))
    assert (file["status"], file["statistics"]["labels"]) == ("processed", {"b\ufffd": 2})


def test_a_large_file_is_examined_after_the_answer(client: TestClient) -> None:
    content = lines(*[CHAT] * 5000)
    file = upload(client, content)
    assert file["status"] == "uploaded"
    assert settled(client, file)["examples"] == 5000


def test_pages_are_openais(client: TestClient, database: Database) -> None:
    made = [upload(client, lines({"text": str(n)}))["id"] for n in range(5)]
    with database.transaction() as session:  # made in the same second
        session.execute(update(StoredFile).values(created_at=1_700_000_000))
    newest_first, seen = sorted(made, reverse=True), []
    page = client.get("/v1/files", params={"limit": 2}).json()
    assert (page["object"], page["first_id"], page["last_id"]) == ("list", newest_first[0], newest_first[1])
    while True:
        seen += [file["id"] for file in page["data"]]
        if not page["has_more"]:
            break
        page = client.get("/v1/files", params={"limit": 2, "after": page["last_id"]}).json()
    assert seen == newest_first
    ascending = client.get("/v1/files", params={"order": "asc", "after": sorted(made)[1]}).json()
    assert [file["id"] for file in ascending["data"]] == sorted(made)[2:]
    assert len(client.get("/v1/files", params={"purpose": "fine-tune"}).json()["data"]) == 5
    assert client.get("/v1/files", params={"purpose": "batch"}).json() == {
        "object": "list",
        "data": [],
        "has_more": False,
        "first_id": None,
        "last_id": None,
    }


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"after": "file-" + "0" * 24}, "after"),
        ({"after": "x\0"}, "after"),
        ({"limit": 0}, "limit"),
        ({"limit": 10_001}, "limit"),
        ({"order": "newest"}, "order"),
    ],
)
def test_pages_that_cannot_be_are_refused(client: TestClient, query: dict[str, Any], param: str) -> None:
    answer = client.get("/v1/files", params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_file_that_is_too_large_is_refused_and_nothing_is_left(
    settings: Settings, database: Database, chunked: bool
) -> None:
    small = settings.model_copy(update={"max_file_bytes": 2000})
    with local_client(small) as client:
        for size, status in ((2000, 200), (2001, 413), (200_000, 413)):
            body = PURPOSE + part("file", b'{"text": "%s"}' % (b"x" * (size - 12)), filename="x.jsonl") + END
            content: Any = iter([body]) if chunked else body
            answer = client.post("/v1/files", content=content, headers=FORM)
            assert answer.status_code == status, answer.text
        assert answer.json()["error"]["param"] == "file"
        assert "2,000 bytes" in answer.json()["error"]["message"]
    assert len(kept(settings)) == 1


def test_a_file_of_somebody_else_is_not_there(office: Office) -> None:
    mine, other, admin = office.client(), office.client(), office.client(Scope.ADMIN)
    file = upload(mine)
    path = f"/v1/files/{file['id']}"
    for answer in (other.get(path), other.get(f"{path}/content"), other.delete(path)):
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "file_id")
    assert other.get("/v1/files").json()["data"] == []
    assert other.get("/v1/files", params={"after": file["id"]}).status_code == 400
    assert [found["id"] for found in admin.get("/v1/files").json()["data"]] == [file["id"]]
    reader = office.client(Scope.READ)
    assert reader.post("/v1/files", content=PURPOSE + FILE + END, headers=FORM).status_code == 403
    assert mine.delete(path).status_code == 200


@pytest.mark.parametrize("file_id", ["file-1", "job-0", "..", "%00", "file-" + "0" * 24, "file-" + "g" * 24])
def test_a_file_that_is_not_there(client: TestClient, file_id: str) -> None:
    for answer in (client.get(f"/v1/files/{file_id}"), client.delete(f"/v1/files/{file_id}")):
        assert answer.status_code in (404, 405)
        assert answer.headers["x-should-retry"] == "false"


def test_files_count_against_the_storage_of_a_key(office: Office) -> None:
    client = office.client(quotas=Quotas(storage_bytes=100_000))
    first = upload(client, lines({"text": "x" * 60_000}))
    body = PURPOSE + part("file", lines({"text": "x" * 60_000}), filename="x.jsonl") + END
    for content in (body, iter([body])):  # told in advance, and not
        answer = client.post("/v1/files", content=content, headers=FORM)
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "insufficient_quota")
        assert answer.headers["x-should-retry"] == "false"
    assert len(kept(office.settings)) == 1
    # A repetition of the one that is there takes no more.
    body = PURPOSE + part("file", lines({"text": "x" * 60_000}), filename=first["filename"]) + END
    again = client.post("/v1/files", content=body, headers=FORM | {"x-stainless-retry-count": "1"})
    assert (again.status_code, again.json()["id"]) == (200, first["id"])
    client.delete(f"/v1/files/{first['id']}")
    upload(client, lines({"text": "x" * 60_000}))


def test_a_file_that_a_job_needs_is_not_removed(client: TestClient, database: Database, settings: Settings) -> None:
    file = upload(client)
    job_id = needing(database, settings, file["id"])
    answer = client.delete(f"/v1/files/{file['id']}")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "file_needed"
    assert job_id in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
    wishes.cancel(database, settings, job_id)
    assert client.delete(f"/v1/files/{file['id']}").status_code == 200
    assert kept(settings) == []
    wishes.remove(database, job_id)


def test_a_file_whose_bytes_are_gone_is_told_once(client: TestClient, settings: Settings) -> None:
    file = upload(client)
    [path] = kept(settings)
    path.unlink()
    answer = client.get(f"/v1/files/{file['id']}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "file_damaged")
    assert answer.headers["x-should-retry"] == "false"


def test_a_client_that_sends_a_file_again_gets_the_first_one(client: TestClient) -> None:
    """Which the OpenAI client does by itself where it heard nothing."""
    body, again = PURPOSE + FILE + END, FORM | {"x-stainless-retry-count": "1"}
    first = client.post("/v1/files", content=body, headers=FORM | {"x-stainless-retry-count": "0"}).json()
    assert client.post("/v1/files", content=body, headers=again).json()["id"] == first["id"]
    other = PURPOSE + part("file", lines(CHAT, CHAT), filename="train.jsonl") + END
    assert client.post("/v1/files", content=other, headers=again).json()["id"] != first["id"]
    assert upload(client)["id"] != first["id"]
