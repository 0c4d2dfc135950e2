"""An export beside its run: made once, whoever asks, and by a process of its own whose failures keep their names.

What was asked for longest ago gives way to others, but never what is in use, and never what somebody else has made.
"""

import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trainer import exporting
from trainer.errors import CheckpointError
from trainer.exporting import Export, ExportFailed, exported, tidy
from trainer.rundir import RunDir


def test_of_several_that_ask_at_once_one_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, begun, go_on = [], threading.Event(), threading.Event()

    def slowly(rundir: RunDir, step: int, *_: Any) -> int:
        begun.set()
        assert go_on.wait(20)
        rundir.export(step).mkdir()
        made.append(step)
        return 0

    monkeypatch.setattr(exporting, "_export", slowly)
    (tmp_path / "spec.json").touch()
    left = tmp_path / "exports" / ".step-00000007.partial-1"
    left.mkdir(parents=True)
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(exported, RunDir(tmp_path), 7, threading.Event()) for _ in range(3)]
        assert begun.wait(20)
        assert not any(one.done() for one in asked)
        go_on.set()
        found = [one.result(20) for one in asked]
    for export in found:
        assert export is not None and export.path == tmp_path / "exports" / "step-00000007"
        export.close()
    assert made == [7]
    assert not left.exists()


def test_a_failure_keeps_its_name_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text("{}")
    with pytest.raises(ExportFailed, match=r"step 7 in .* cannot be exported: .*Field required") as found:
        exported(RunDir(tmp_path), 7, threading.Event())
    assert found.value.name == "bad_configuration" and found.value.code > 0
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["lock"]
    with pytest.raises(CheckpointError, match="is gone or is not seen from here"):
        exported(RunDir(tmp_path / "nothing"), 7, threading.Event())


def test_who_has_gone_waits_for_no_export(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text("{}")
    gone = threading.Event()
    (tmp_path / "exports").mkdir()
    with (tmp_path / "exports" / "lock").open("a") as other, ThreadPoolExecutor(1) as threads:
        fcntl.flock(other, fcntl.LOCK_EX)
        asked = threads.submit(exported, RunDir(tmp_path), 7, gone)
        assert not asked.done()
        gone.set()
        assert asked.result(20) is None


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks for the export of (run, step), which is 100 bytes when it is made, with the installation's limit."""

    def write(rundir: RunDir, step: int, *_: Any) -> int:
        rundir.export(step).mkdir()
        (rundir.export(step) / "model").write_bytes(bytes(100))
        return 0

    def ask(run: str, step: int, most_bytes: int = 250) -> Export:
        rundir = RunDir(tmp_path / run)
        rundir.root.mkdir(exist_ok=True)
        rundir.spec.touch()
        export = exported(rundir, step, threading.Event(), most_bytes)
        assert export is not None
        return export

    monkeypatch.setattr(exporting, "_export", write)
    return ask


def test_an_export_that_is_whole_counts_whatever_its_exporter_ended_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    written = exporting._export

    def killed_at_its_end(*arguments: Any) -> int:
        written(*arguments)
        return -9

    monkeypatch.setattr(exporting, "_export", killed_at_its_end)
    made("a", 1).close()
    made("b", 1).close()
    made("c", 1, most_bytes=150).close()
    assert exports(tmp_path) == ["c step-00000001"]


def exports(directory: Path) -> list[str]:
    return sorted(f"{path.parts[-3]} {path.name}" for path in directory.glob("*/exports/step-*") if path.is_dir())


def asked_for(export: Export, seconds_ago: float) -> None:
    at = (export.path.with_name(export.path.name + ".used")).stat().st_mtime - seconds_ago
    os.utime(export.path.with_name(export.path.name + ".used"), (at, at))


def test_the_one_asked_for_longest_ago_gives_way(tmp_path: Path, made: Any) -> None:
    for seconds_ago, (run, step) in ((30, ("a", 1)), (20, ("b", 1))):
        export = made(run, step)
        asked_for(export, seconds_ago)
        export.close()
    made("a", 1).close()  # again: now it is b's turn
    made("a", 2).close()
    assert exports(tmp_path) == ["a step-00000001", "a step-00000002"]
    assert sorted(path.name for path in (tmp_path / "b" / "exports").iterdir()) == ["lock"]
    made("b", 1).close()  # what was removed is made again
    assert "b step-00000001" in exports(tmp_path)
    tidy(tmp_path, 0)
    assert exports(tmp_path) == []


def test_what_is_in_use_stays_also_by_a_process_that_was_left_behind(tmp_path: Path, made: Any) -> None:
    export = made("a", 1, 0)
    assert export.used is not None
    inherited = os.dup(export.used.fileno())
    made("b", 1, 0).close()
    assert exports(tmp_path) == ["a step-00000001", "b step-00000001"]
    export.close()
    tidy(tmp_path, 0)
    assert exports(tmp_path) == ["a step-00000001"]
    os.close(inherited)
    tidy(tmp_path, 0)
    assert exports(tmp_path) == []


def test_what_somebody_else_has_put_there_is_used_and_stays(tmp_path: Path, made: Any) -> None:
    own = tmp_path / "a" / "exports" / "step-00000001"
    own.mkdir(parents=True)
    (own / "model").write_bytes(bytes(1000))
    export = made("a", 1, 0)
    assert (export.path, export.used) == (own, None)
    made("b", 1, 0).close()
    tidy(tmp_path, 0)
    assert exports(tmp_path) == ["a step-00000001"]
