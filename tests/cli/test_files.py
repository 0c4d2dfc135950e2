"""stiefel files, as a person types it, against the API alone."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.forms import CHAT, lines
from tests.api.served import Served, serving

STIEFEL = str(Path(sys.executable).with_name("stiefel"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), auth="off") as opened:
        yield opened


def stiefel(served: Served, *arguments: str, code: int = 0) -> str:
    environment = os.environ | {"STIEFEL_API": served.url, "COLUMNS": "200"}
    done = subprocess.run([STIEFEL, "files", *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_file_goes_up_comes_down_and_away(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines(CHAT, CHAT))
    shown = stiefel(served, "upload", str(path), "--expires-after", "3600")
    found = re.search(r"file-[0-9a-f]{24}", shown)
    assert found is not None
    assert "is processed: 2 examples (chat)" in shown
    assert found[0] in stiefel(served, "list")
    assert json.loads(stiefel(served, "list", "--json"))["data"][0]["expires_at"] is not None
    assert stiefel(served, "content", found[0]) == path.read_text()
    stiefel(served, "content", found[0], "--out", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == path.read_bytes()
    assert "cannot be written" in stiefel(served, "content", found[0], "--out", str(tmp_path / "out"), code=1)
    assert "is deleted" in stiefel(served, "delete", found[0])
    assert "there is no file" in stiefel(served, "content", found[0], code=1)


def test_what_is_wrong_with_a_file_is_said(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("question,answer\na,b\n")
    assert "line 2: has the fields 'question', 'answer'" in stiefel(served, "upload", str(path), code=1)
    assert "3,600" in stiefel(served, "upload", str(path), "--expires-after", "1", code=1)
    columns = json.dumps({"prompt": "question", "completion": "answer"})
    assert json.loads(stiefel(served, "upload", str(path), "--columns", columns, "--json"))["examples"] == 1
    assert "cannot be read" in stiefel(served, "upload", str(tmp_path / "nothing"), code=1)
