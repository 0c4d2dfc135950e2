"""Lines of the log carry what they belong to, in both forms."""

import json
import logging
import threading
from collections.abc import Iterator

import pytest

from trainer import logs
from trainer.errors import SpecError

log = logging.getLogger("stiefel.test")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    monkeypatch.setattr(logs, "_of_process", {})
    yield
    root.handlers[:], root.level = before
    logging.captureWarnings(False)


def test_a_line_of_text_ends_with_its_ids(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "info")
    with logs.about(job_id="job-1", request_id=None), logs.about(attempt=2):
        log.info("it begins")
    log.info("nobody's")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("INFO stiefel.test: it begins [job_id=job-1 attempt=2]")
    assert second.endswith("INFO stiefel.test: nobody's")


def test_a_line_of_json_has_them_as_fields_and_a_traceback_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    with logs.about(job_id="job-1"):
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("it failed", extra={"request_id": "r"})
    [line] = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert (found["level"], found["logger"], found["message"]) == ("ERROR", "stiefel.test", "it failed")
    assert (found["job_id"], found["request_id"]) == ("job-1", "r")
    assert found["exception"].endswith("ValueError: no")


def test_what_is_said_of_one_line_goes_before_what_is_said_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "info")
    with logs.about(job_id="around"):
        log.info("x", extra={"job_id": "its own"})
    assert capsys.readouterr().err.strip().endswith("[job_id=its own]")


def test_less_than_the_level_is_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "warning")
    log.info("x")
    assert capsys.readouterr().err == ""


def test_a_trainer_is_told_by_its_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {logs.FORM: "json", logs.IDS["job_id"]: "job-1", logs.IDS["attempt"]: "3", logs.IDS["request_id"]: ""}
    for name, value in told.items():
        monkeypatch.setenv(name, value)

    def as_told() -> None:
        assert logs.configure_trainer() == "json"
        log.info("x")

    thread = threading.Thread(target=lambda: log.info("y"))
    as_told()
    thread.start()
    thread.join()
    for line in capsys.readouterr().err.splitlines():
        found = json.loads(line)
        assert (found["job_id"], found["attempt"], found.get("request_id")) == ("job-1", 3, None)


def test_a_form_that_there_is_not_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORM, "xml")
    with pytest.raises(SpecError, match="STIEFEL_LOG_FORMAT: 'xml' is none of text, json"):
        logs.configure_trainer()
