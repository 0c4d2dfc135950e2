"""An export beside its run: made once, whoever asks, and by a process of its own whose failures keep their names."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer import exporting
from trainer.errors import CheckpointError, SpecError
from trainer.exporting import exported
from trainer.rundir import RunDir


def test_of_several_that_ask_at_once_one_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, begun, go_on = [], threading.Event(), threading.Event()

    def slowly(rundir: RunDir, step: int, out: Path, lock: int) -> None:
        begun.set()
        assert go_on.wait(20)
        out.mkdir()
        made.append(step)

    monkeypatch.setattr(exporting, "_export", slowly)
    left = tmp_path / "exports" / ".step-00000007.partial-1"
    left.mkdir(parents=True)
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(exported, RunDir(tmp_path), 7) for _ in range(3)]
        assert begun.wait(20)
        assert not any(one.done() for one in asked)
        go_on.set()
        assert {one.result(20) for one in asked} == {tmp_path / "exports" / "step-00000007"}
    assert made == [7]
    assert not left.exists()


def test_a_failure_keeps_its_name_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"step 7 of .* cannot be exported: bad_configuration: .*spec.json"):
        exported(RunDir(tmp_path), 7)
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["lock"]
    with pytest.raises(CheckpointError, match="there is no run directory"):
        exported(RunDir(tmp_path / "nothing"), 7)
