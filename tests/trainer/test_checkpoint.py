"""Checkpoints: whole or not there, checked when read, bounded in number."""

import json
from pathlib import Path

import pytest

from tests.trainer.alone import make_run
from trainer import checkpoint
from trainer.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 1 and 2."""
    run, _ = make_run(tmp_path, optimisation={"keep_checkpoints": 2})
    for _ in range(3):
        run.train_step(lambda: False)
        run.save()
    return tmp_path


def rundir(saved: Path) -> checkpoint.RunDir:
    return checkpoint.RunDir(saved / "run")


def test_only_the_newest_are_kept(saved: Path) -> None:
    assert [path.name for path in rundir(saved).complete_checkpoints()] == ["step-00000002", "step-00000003"]
    assert len(list(rundir(saved).checkpoints.iterdir())) == 2


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(saved: Path) -> None:
    file = rundir(saved).checkpoint(3) / "rank-00.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = checkpoint.newest(rundir(saved))
    assert found is not None
    assert found.step == 2
    (rundir(saved).checkpoint(2) / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        checkpoint.newest(rundir(saved))


def test_a_damaged_newest_does_not_push_a_good_one_out(saved: Path) -> None:
    (rundir(saved).checkpoint(3) / "rank-00.safetensors").write_bytes(b"damaged")
    leftover = rundir(saved).checkpoints / "step-00000009.tmp"
    leftover.mkdir()
    (leftover / "COMPLETE").touch()  # killed between the marker and the rename
    run, _ = make_run(saved, optimisation={"keep_checkpoints": 1})
    assert run.step == 2
    run.save()
    assert [path.name for path in rundir(saved).checkpoints.iterdir()] == ["step-00000002"]


def test_a_directory_without_its_marker_does_not_count(saved: Path) -> None:
    (rundir(saved).checkpoint(3) / "COMPLETE").unlink()
    found = checkpoint.newest(rundir(saved))
    assert found is not None
    assert found.step == 2
    # What a killed writer leaves behind is no obstacle to the next one.
    run, _ = make_run(saved, optimisation={"keep_checkpoints": 2})
    assert run.step == 2
    run.train_step(lambda: False)
    run.save()
    assert checkpoint.read(rundir(saved).checkpoint(3)).step == 3


def test_a_checkpoint_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit this model"):
        make_run(saved, method={"rank": 8})


def test_nothing_in_it_is_a_pickle(saved: Path) -> None:
    names = {path.name for path in rundir(saved).checkpoint(3).iterdir()}
    assert names == {"rank-00.safetensors", "state.json", "COMPLETE"}
    state = json.loads((rundir(saved).checkpoint(3) / "state.json").read_text())
    assert state["step"] == 3
