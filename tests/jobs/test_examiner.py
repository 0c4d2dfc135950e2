"""How files are examined: with which tokeniser, and what becomes of those whose examination fails."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from jobs import examiner, filecheck, files
from jobs.database import Database
from jobs.errors import StoreAway, TokenizerUnloadable
from jobs.examiner import check_tokenizer
from jobs.filecheck import Checker, check
from jobs.files import Status
from jobs.settings import Settings
from jobs.tables import StoredFile
from tests.api.forms import CHAT, lines
from tests.jobs.test_files import RUNNING, stored
from tests.trainer.test_lengths import saved
from trainer.process import free_port

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
REFUSED = {"messages": [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    saved(directory)
    return directory


def checked(database: Database, settings: Settings, *records: Any) -> StoredFile:
    found = check(database, settings, stored(database, settings, lines(*records)).id, RUNNING)
    assert found is not None
    return found


@SQLITE
def test_a_file_is_counted_with_the_installation_s_tokeniser(
    database: Database, settings: Settings, tokenizer: Path, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"files_tokenizer": str(tokenizer)})
    check_tokenizer(settings)
    texts = ["A larch.", "Ünïcödé 🌲", "Which tree is it?"]
    file = checked(database, settings, *({"text": text} for text in texts))
    counts = [len(saved(tmp_path)(text)["input_ids"]) + 1 for text in texts]  # and the end of the text
    assert file.statistics["tokens"] == {
        "tokenizer": str(tokenizer),
        "tokens": sum(counts),
        "trained_tokens": sum(counts) - len(texts),
        "shortest": min(counts),
        "median": median(counts),
        "longest": max(counts),
    }


@SQLITE
def test_what_a_chat_template_refuses_is_counted_apart_and_no_error(
    database: Database, settings: Settings, tokenizer: Path
) -> None:
    settings = settings.model_copy(update={"files_tokenizer": str(tokenizer)})
    file = checked(database, settings, CHAT, REFUSED, REFUSED)
    assert (file.status, file.examples, file.statistics["tokens"]["not_counted"]) == (Status.PROCESSED, 3, 2)
    assert "the chat template refuses" in file.statistics["tokens"]["not_counted_because"]
    assert file.statistics["tokens"]["shortest"] == file.statistics["tokens"]["longest"] > 0


@SQLITE
def test_a_tokeniser_that_has_gone_since_the_start_makes_no_errors(
    database: Database, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = checked(database, settings.model_copy(update={"files_tokenizer": str(tmp_path / "gone")}), CHAT)
    assert (file.status, file.statistics["tokens"]["tokenizer"]) == (Status.PROCESSED, "bytes")
    assert "not with STIEFEL_FILES_TOKENIZER" in caplog.text


@SQLITE
def test_a_tokeniser_of_the_hub_is_read_from_what_was_fetched(
    database: Database, settings: Settings, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the hub's client's own layout."""
    model = tmp_path / "hub" / "models--somebody--something"
    snapshot = model / "snapshots" / ("a" * 40)
    shutil.copytree(tokenizer, snapshot)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    # Asked for, and not there.
    for name in ("config.json", "added_tokens.json", "special_tokens_map.json"):
        if not (tokenizer / name).exists():
            (missing := model / ".no_exist" / ("a" * 40) / name).parent.mkdir(parents=True, exist_ok=True)
            missing.touch()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = settings.model_copy(update={"files_tokenizer": "somebody/something"})
    check_tokenizer(settings)
    assert checked(database, settings, CHAT).statistics["tokens"]["tokenizer"] == "somebody/something"
    with pytest.raises(TokenizerUnloadable, match="STIEFEL_FILES_TOKENIZER: 'somebody/else' cannot count"):
        check_tokenizer(settings.model_copy(update={"files_tokenizer": "somebody/else"}))


@SQLITE
def test_fetching_has_a_password_and_reading_files_has_none(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "STIEFEL_DATABASE_URL", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hush")
    seen = tmp_path / "seen"
    code = (
        f"import os, json; open({str(seen)!r}, 'a').write(json.dumps(dict(os.environ)) + '\\n'); raise SystemExit(64)"
    )
    monkeypatch.setattr(examiner, "_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(TokenizerUnloadable):
        check_tokenizer(settings.model_copy(update={"files_tokenizer": "somebody/something"}))
    alone, fetching = map(json.loads, seen.read_text().splitlines())
    assert [name for name, value in alone.items() if value == "hush"] == []
    assert alone["HF_HUB_OFFLINE"] == "1"
    assert [name for name, value in fetching.items() if value == "hush"] == ["HF_TOKEN"]


def test_the_api_does_not_start_with_a_tokeniser_that_cannot_be_loaded(tmp_path: Path) -> None:
    environment = os.environ | {"STIEFEL_HOME": str(tmp_path), "STIEFEL_FILES_TOKENIZER": str(tmp_path / "none")}
    command = [sys.executable, "-m", "api", "--port", str(free_port())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert (
        f"api: STIEFEL_FILES_TOKENIZER: '{tmp_path}/none' cannot count the tokens of files: tokenizer:" in done.stderr
    )
    assert "Give 'bytes', a directory with tokenizer.json" in done.stderr


def test_an_examination_that_fails_unforeseen_is_not_repeated(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something that nobody has thought of")

    monkeypatch.setattr(examiner, "examine", fails)
    monkeypatch.setattr(filecheck, "_FORGOTTEN_SECONDS", -1.0)
    file = stored(database, settings)
    checker = Checker(database, settings)
    checker.catch_up()
    checker.close()
    found = files.get(database, file.id)
    assert (found.status, found.status_details) == (Status.ERROR, examiner.UNFORESEEN)
    [logged] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert file.id in logged.getMessage() and logged.exc_info is not None


@SQLITE
def test_a_process_that_fails_unforeseen_says_nothing_of_limits(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(examiner, "_SMALL_BYTES", 0)
    monkeypatch.setattr(examiner, "_command", lambda *_: [sys.executable, "-c", "raise KeyError('nobody knows')"])
    assert checked(database, settings, CHAT).status_details == examiner.UNFORESEEN
    assert "nobody knows" in caplog.text


def test_what_the_database_cannot_hold_is_not_repeated(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examiner, "_here", lambda *_: examiner.refused("half of a pair: \ud800"))
    assert checked(database, settings, CHAT).status_details == examiner.UNFORESEEN


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OperationalError("SELECT 1", {}, OSError())])
def test_a_store_or_a_database_that_is_away_is_waited_for(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise error

    file = stored(database, settings)
    with monkeypatch.context() as patch:
        if isinstance(error, OSError):
            patch.setattr(examiner, "examine", away)
        else:
            patch.setattr(filecheck._Hold, "finish", away)
        with pytest.raises((StoreAway, OperationalError)):
            check(database, settings, file.id, threading.Event())
    left = files.get(database, file.id)
    assert left.status == Status.UPLOADED
