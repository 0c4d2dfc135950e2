"""Uploads for tests: through a client of this process, or byte by byte."""

import json
import time
from typing import Any

from fastapi.testclient import TestClient

CHAT = {"messages": [{"role": "user", "content": "Which tree?"}, {"role": "assistant", "content": "A larch."}]}


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def upload(
    client: TestClient,
    content: bytes = lines(CHAT),
    name: str = "train.jsonl",
    purpose: str = "fine-tune",
    **fields: str,
) -> dict[str, Any]:
    answer = client.post("/v1/files", files={"file": (name, content)}, data={"purpose": purpose} | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def settled(client: TestClient, file: dict[str, Any]) -> dict[str, Any]:
    """After it has been examined."""
    deadline = time.monotonic() + 60
    while (found := client.get(f"/v1/files/{file['id']}").json())["status"] == "uploaded":
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return dict(found)


def part(name: str, value: bytes, *, filename: str | None = None, headers: bytes = b"") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if filename is not None:
        disposition += f'; filename="{filename}"'
    return b"--edge\r\n" + disposition.encode() + b"\r\n" + headers + b"\r\n" + value + b"\r\n"


FORM = {"content-type": "multipart/form-data; boundary=edge"}
PURPOSE = part("purpose", b"fine-tune")
FILE = part("file", lines(CHAT), filename="train.jsonl")
END = b"--edge--\r\n"
