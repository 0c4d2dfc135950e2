"""What an upload may be: every kind of file, and every kind of body that is none. The database does not matter here."""

import asyncio
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from api import uploads
from jobs.settings import Settings
from migrations.__main__ import upgrade
from tests.api.forms import CHAT, END, FILE, FORM, PURPOSE, lines, part, settled, upload
from tests.api.local import local_client


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"), auth="off")


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[TestClient]:
    upgrade(settings.url)
    with local_client(settings) as opened:
        yield opened


@pytest.fixture
def kept(settings: Settings) -> Iterator[set[Path]]:
    """The files that the store has when a test begins; it has the same at the end."""
    before = {path for path in settings.files.rglob("*") if path.is_file()}
    yield before
    assert {path for path in settings.files.rglob("*") if path.is_file()} == before


def table(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), written)
    return written.getvalue()


PAIRS = [{"question": f"What is {n}?", "answer": str(n)} for n in range(3)]
JUDGED = [{"sentence": f"Sentence {n}", "label": str(n % 2)} for n in range(5)]


@pytest.mark.parametrize(
    ("content", "name", "columns", "format", "examples"),
    [
        (lines({"prompt": "a", "completion": "b"}), "x.jsonl", "", "prompt", 1),
        (lines({"text": "a"}), "x.json", "", "text", 1),
        (lines({"text": "a"}), "whatever it is", "", "text", 1),
        (lines(*PAIRS), "x.jsonl", '{"prompt": "question", "completion": "answer"}', "prompt", 3),
        (table(PAIRS), "x.csv", '{"prompt": "question", "completion": "answer"}', "prompt", 3),
        (b"\xef\xbb\xbf" + table(PAIRS), "x.CSV", '{"prompt": "question", "completion": "answer"}', "prompt", 3),
        (table(JUDGED, "\t"), "x.tsv", '{"text": "sentence"}', "labelled", 5),
        (b"gj04\t1\t\tA sentence.\n", "x.tsv", '{"text": "4", "label": "2"}', "labelled", 1),
        (parquet([CHAT] * 7), "x.parquet", "", "chat", 7),
        (parquet(PAIRS), "x.parquet", '{"prompt": "question", "completion": "answer"}', "prompt", 3),
    ],
)
def test_each_kind_of_file_is_understood(
    client: TestClient, content: bytes, name: str, columns: str, format: str, examples: int
) -> None:
    fields = {"columns": columns} if columns else {}
    file = settled(client, upload(client, content, name, **fields))
    assert (file["status"], file["status_details"]) == ("processed", None)
    assert (file["format"], file["examples"]) == (format, examples)


@pytest.mark.parametrize(
    ("content", "name", "details"),
    [
        (lines(CHAT) + b"{\n" + lines(CHAT, {"messages": []}), "x.jsonl", "line 2: is not JSON"),
        (lines(*PAIRS), "x.jsonl", "lines 1, 2, 3: has the fields 'question', 'answer'; needed are 'messages'"),
        (lines(CHAT, {"text": "a"}), "x.jsonl", "line 2: messages is missing"),
        (b"\n\n", "x.jsonl", "the file has no examples"),
        (table(PAIRS)[:30], "x.csv", "line 2: has the fields"),
        (b"PAR1 and nothing more", "x", "line 1: is not Parquet"),
        (b"\x00" * 1000, "x.jsonl", "line 1: is not JSON"),
        ("text\nä".encode("latin-1"), "x.csv", "line 2: is not UTF-8"),
    ],
)
def test_what_is_wrong_is_told_by_line(client: TestClient, content: bytes, name: str, details: str) -> None:
    file = settled(client, upload(client, content, name))
    assert file["status"] == "error"
    assert details in file["status_details"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"purpose": "batch"}, "purpose", "'batch' is none that is taken here; choose among 'fine-tune'"),
        ({"purpose": "fine-tune\0"}, "purpose", "NUL"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}, "expires_after[seconds]", "3,600"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"}, "expires_after[seconds]", ""),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "1e4"}, "expires_after[seconds]", ""),
        ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]", ""),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after[anchor]", "created_at"),
        ({"expires_after[seconds]": "3600"}, "expires_after[anchor]", ""),
        ({"columns": "["}, "columns", "no JSON object"),
        ({"columns": "[" * 10_000}, "columns", "no JSON object"),
        ({"columns": "[]"}, "columns", ""),
        ({"columns": '{"question": "prompt"}'}, "columns", "'question' is no field"),
        ({"columns": '{"prompt": 1}'}, "columns", ""),
        ({"columns": '{"prompt": "a\\u0000"}'}, "columns", "no name of a column"),
        ({"columns": '{"prompt": "a\\ud800"}'}, "columns", "no name of a column"),
        ({"columns": "[]", "columns[prompt]": "a"}, "columns", "give a JSON object"),
        ({"colour": "red"}, "colour", "there is no such field; those that there are: file, purpose"),
        ({"columns": "x" * 20_000}, "columns", "longer than"),
    ],
)
def test_fields_that_cannot_be_are_refused_by_name(
    client: TestClient, kept: set[Path], fields: dict[str, str], param: str, words: str
) -> None:
    answer = client.post("/v1/files", files={"file": ("x.jsonl", lines(CHAT))}, data={"purpose": "fine-tune"} | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert words in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


MANY = b"".join(part(f"f{n}", b"x") for n in range(30))
HEADED = part("file", b"x", filename="x", headers=b"".join(b"X-%d: y\r\n" % n for n in range(30)))


@pytest.mark.parametrize(
    ("body", "headers", "param", "words"),
    [
        (b"{}", {"content-type": "application/json"}, None, "send multipart/form-data"),
        (b"{}", {}, None, "send multipart/form-data"),
        (PURPOSE + FILE + END, {"content-type": "multipart/form-data"}, None, "needs a boundary"),
        (PURPOSE + FILE + END, {"content-type": f"multipart/form-data; boundary={'e' * 300}"}, None, "boundary"),
        (b"", FORM, None, "ends before"),
        (END, FORM, "file", "it is missing"),
        (b"hello", FORM, None, "no multipart form"),
        (PURPOSE + FILE, FORM, None, "ends before"),
        (PURPOSE + FILE[:-20], FORM, None, "ends before"),
        (PURPOSE + END, FORM, "file", "it is missing"),
        (FILE + END, FORM, "purpose", "it is missing"),
        (PURPOSE + part("file", b"hello") + END, FORM, "file", "without a filename"),
        (PURPOSE + part("file", b"", filename="x.jsonl") + END, FORM, "file", "it is empty"),
        (PURPOSE + FILE + FILE + END, FORM, "file", "given twice"),
        (PURPOSE + PURPOSE + FILE + END, FORM, "purpose", "given twice"),
        (PURPOSE + part("file", b"x", filename="a\0b") + END, FORM, "file", "NUL"),
        (PURPOSE + part("file", b"x", filename="..") + END, FORM, "file", "cannot be its name"),
        (PURPOSE + part("file", b"x", filename="") + END, FORM, "file", ""),
        (PURPOSE + part("file", b"x", filename="x" * 300) + END, FORM, "file", "1 to 255 bytes"),
        (MANY + END, FORM, None, "more than 20 fields"),
        (HEADED + END, FORM, None, "header"),
        (part("p\xff", b"x") + FILE + END, FORM, "purpose", "it is missing"),
        (part("ü" * 99, b"x" * 20_000) + END, FORM, ascii("ü" * 60), "longer than"),
        (b"--edge\r\nContent-Type: text/plain\r\n\r\nx\r\n" + END, FORM, None, "no Content-Disposition"),
        (part("purpose", b"\xff\xfe") + FILE + END, FORM, "purpose", "not UTF-8"),
        (PURPOSE + part("file", b"eA==", filename="x", headers=b"Content-Transfer-Encoding: base64\r\n") + END, FORM,
         None, "send its bytes as they are"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_form_are_refused_and_nothing_is_left(
    client: TestClient, kept: set[Path], body: bytes, headers: dict[str, str], param: str | None, words: str
) -> None:
    answer = client.post("/v1/files", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert answer.headers["x-should-retry"] == "false"


def test_a_client_that_says_nothing_more_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_SILENT_SECONDS", 0.01)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def ask() -> None:
        async for _ in uploads._pieces(Request({"type": "http"}, receive), 100):
            raise AssertionError

    with pytest.raises(uploads.BadUpload, match="send the file again") as caught:
        asyncio.run(ask())
    assert caught.value.status == 408


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("/etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("Bäume 木.jsonl", "Bäume 木.jsonl"),
        ("a%22b.jsonl", 'a"b.jsonl'),
        ("50%.csv", "50%.csv"),
    ],
)
def test_a_name_leads_nowhere(client: TestClient, settings: Settings, given: str, shown: str) -> None:
    body = PURPOSE + part("file", lines(CHAT), filename=given) + END
    answer = client.post("/v1/files", content=body, headers=FORM)
    assert answer.json()["filename"] == shown
    [path] = (settings.files / answer.json()["id"]).iterdir()
    assert path.name in ("data", "data.jsonl", "data.csv")


def test_a_form_may_come_in_any_pieces(client: TestClient) -> None:
    body = PURPOSE + FILE + END

    def bytewise() -> Iterator[bytes]:
        for place in range(len(body)):
            yield body[place : place + 1]

    answer = client.post("/v1/files", content=bytewise(), headers=FORM)
    assert answer.json()["status"] == "processed", answer.text
