"""An export beside its run: made once, whoever asks, and by a process of its own whose failures keep their names."""

import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trainer import exporting
from trainer.errors import CheckpointError
from trainer.exporting import ExportFailed, exported
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
        assert {one.result(20) for one in asked} == {tmp_path / "exports" / "step-00000007"}
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
