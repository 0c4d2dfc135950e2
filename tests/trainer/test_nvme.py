"""Where state and parameters go that are kept in files. That training from them is the same: tests/distributed."""

from pathlib import Path

import pytest

from tests.trainer.alone import alone
from trainer import nvme
from trainer.config import TrainingSpec
from trainer.errors import SpecError
from trainer.rundir import RunDir


def wanted(tmp_path: Path, disk: Path) -> TrainingSpec:
    return alone(tmp_path, deepspeed={"zero_stage": 3, "offload": "nvme", "nvme_path": str(disk)})


@pytest.mark.parametrize("compatible", [False, True])
def test_it_is_refused_at_the_start_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compatible: bool
) -> None:
    monkeypatch.setattr(nvme.AsyncIOBuilder, "is_compatible", lambda *_, **__: compatible)
    spec = wanted(tmp_path, tmp_path / "missing")
    message = "nvme_path: .*missing' is no directory" if compatible else "offload: nvme needs .* libaio-dev"
    with pytest.raises(SpecError, match=f"deepspeed.{message}"), nvme.own_directory(spec, RunDir(tmp_path), 0):
        raise AssertionError("it went on")


def test_runs_share_a_disk_and_leave_nothing_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme.AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    disk = tmp_path / "disk"
    disk.mkdir()
    spec = wanted(tmp_path, disk)
    # Of one name, in different places.
    runs = [RunDir(tmp_path / place / "run") for place in "ab"]
    used = []
    for rundir in runs:
        for rank in (0, 1):
            context = nvme.own_directory(spec, rundir, rank)
            used.append((context, context.__enter__().deepspeed.nvme_path))
    paths = [Path(str(path)) for _, path in used]
    assert len({*paths}) == 4
    assert all(path.is_dir() and disk in path.parents for path in paths)
    for context, _ in used:
        context.__exit__(None, None, None)
    assert list(disk.iterdir()) == []


def test_what_a_killed_process_has_left_is_gone_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme.AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    spec = wanted(tmp_path, tmp_path)
    killed = nvme.own_directory(spec, RunDir(tmp_path / "run"), 0)
    left = Path(str(killed.__enter__().deepspeed.nvme_path)) / "left.swp"
    left.touch()
    with nvme.own_directory(spec, RunDir(tmp_path / "run"), 0) as own:
        assert own.deepspeed.nvme_path == str(left.parent)
        assert not left.exists()
