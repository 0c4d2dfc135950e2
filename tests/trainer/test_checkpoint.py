"""Checkpoints: whole or not there, checked when read, bounded in number, written while training goes on."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.alone import make_run
from trainer import events
from trainer.checkpoint import reading, writing
from trainer.checkpoint.place import Directory
from trainer.checkpoint.retention import hold, kept
from trainer.config import CheckpointSpec
from trainer.errors import CheckpointError, TrainerError
from trainer.run import Run
from trainer.rundir import RunDir

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 2 and 3."""
    run, _ = make_run(tmp_path, checkpoints={"keep": 2})
    for _ in range(3):
        run.train_step(lambda: False)
        run.save()
    return tmp_path


def rundir(saved: Path) -> RunDir:
    return RunDir(saved / "run")


def place(saved: Path) -> Directory:
    return Directory(rundir(saved).checkpoints)


def test_only_the_newest_are_kept(saved: Path) -> None:
    assert place(saved).complete_steps() == [2, 3]
    assert len(list(rundir(saved).checkpoints.iterdir())) == 2


@pytest.mark.parametrize("url", [None, "memory://held"])
def test_those_that_are_held_stay_until_they_are_not(tmp_path: Path, url: str | None) -> None:
    run, _ = make_run(tmp_path, checkpoints={"keep": 1, "url": url})

    def save() -> list[int]:
        run.train_step(lambda: False)
        run.save()
        return run.place.complete_steps()

    save()
    hold(rundir(tmp_path), {1})
    save()
    assert save() == [1, 3]
    # Nobody knows what is needed: then nothing is removed.
    rundir(tmp_path).held.write_text("[")
    assert save() == [1, 3, 4]
    hold(rundir(tmp_path), set())
    assert save() == [5]


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    run, found = make_run(tmp_path, checkpoints={"keep": 1})
    for loss in (5.0, 3.0, 4.0, None, 3.5):
        run.train_step(lambda: False)
        run.save(loss)
    assert Directory(RunDir(tmp_path / "run").checkpoints).complete_steps() == [2, 5]
    assert reading.best(Directory(RunDir(tmp_path / "run").checkpoints)).step == 2
    assert [e.loss for e in found if isinstance(e, events.Checkpointed)] == [5.0, 3.0, 4.0, None, 3.5]


@pytest.mark.parametrize(
    ("losses", "keep", "keep_best", "remaining"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}, 2, True, {2, 3, 4}),
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}, 2, False, {3, 4}),
        ({1: None, 2: None, 3: None}, 1, True, {3}),
        ({1: 1.0, 2: 1.0, 3: 2.0}, 1, True, {2, 3}),
        ({}, 3, True, set()),
    ],
)
def test_which_ones_are_kept(losses: Any, keep: int, keep_best: bool, remaining: set[int]) -> None:
    assert kept(losses, CheckpointSpec(keep=keep, keep_best=keep_best)) == remaining


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(saved: Path) -> None:
    file = rundir(saved).checkpoint(3) / "rank-00.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = reading.newest(place(saved))
    assert found is not None
    assert found.step == 2
    (rundir(saved).checkpoint(2) / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        reading.newest(place(saved))


def test_a_damaged_newest_does_not_push_a_good_one_out(saved: Path) -> None:
    (rundir(saved).checkpoint(3) / "rank-00.safetensors").write_bytes(b"damaged")
    leftover = rundir(saved).checkpoint(9)
    leftover.mkdir()  # killed before the marker
    (leftover / "rank-00.safetensors").touch()
    run, _ = make_run(saved, checkpoints={"keep": 1})
    assert run.step == 2
    run.train_step(lambda: False)
    run.train_step(lambda: False)
    run.save()
    assert [path.name for path in rundir(saved).checkpoints.iterdir()] == ["step-00000004"]


def test_a_directory_without_its_marker_does_not_count(saved: Path) -> None:
    (rundir(saved).checkpoint(3) / "COMPLETE").unlink()
    found = reading.newest(place(saved))
    assert found is not None
    assert found.step == 2
    # What a killed writer leaves behind is no obstacle to the next one.
    run, _ = make_run(saved, checkpoints={"keep": 2})
    assert run.step == 2
    run.train_step(lambda: False)
    run.save()
    assert reading.read(place(saved), 3).step == 3


def test_a_checkpoint_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit this model"):
        make_run(saved, method={"rank": 8})


def test_a_format_of_another_version_is_refused_by_its_number(saved: Path) -> None:
    for step in (2, 3):
        file = rundir(saved).checkpoint(step) / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 2"):
        make_run(saved)


def test_nothing_in_it_is_a_pickle(saved: Path) -> None:
    names = {path.name for path in rundir(saved).checkpoint(3).iterdir()}
    assert names == {"rank-00.safetensors", "state.json", "COMPLETE"}
    state = json.loads((rundir(saved).checkpoint(3) / "state.json").read_text())
    assert state["step"] == 3


# ------------------------------------------------------------------------------------------------- in the background


class SlowDisk:
    """Lets no tensor be written before it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        real = writing.save_file

        def waits(*arguments: Any) -> None:
            assert self.go.wait(30)
            real(*arguments)

        monkeypatch.setattr(writing, "save_file", waits)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_get_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, _ = make_run(tmp_path / "straight")
    for _ in range(2):
        straight.train_step(lambda: False)
    straight.save()

    disk = SlowDisk(monkeypatch)
    run, found = make_run(tmp_path / "slow")
    for _ in range(2):
        run.train_step(lambda: False)
    run.save(wait=False)
    for _ in range(2):
        run.train_step(lambda: False)
    checkpoints = Directory(RunDir(tmp_path / "slow" / "run").checkpoints)
    assert run.writer.pending
    assert checkpoints.complete_steps() == []
    disk.go.set()
    while run.writer.pending:
        run.train_step(lambda: False)
    assert checkpoints.complete_steps() == [2]
    (event,) = [e for e in found if isinstance(e, events.Checkpointed)]
    assert event.step == 2
    assert event.stalled_seconds < event.seconds
    files = [RunDir(tmp_path / name / "run").checkpoint(2) / "rank-00.safetensors" for name in ("straight", "slow")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_second_checkpoint_waits_for_the_first(tmp_path: Path) -> None:
    run, found = make_run(tmp_path)
    for _ in range(3):
        run.train_step(lambda: False)
        run.save(wait=False)
    run.commit()
    assert [e.step for e in found if isinstance(e, events.Checkpointed)] == [1, 2, 3]


def test_a_write_that_fails_ends_the_run_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run(tmp_path)
    run.train_step(lambda: False)
    run.save()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_file", full)
        run.train_step(lambda: False)
        run.save(wait=False)
        with pytest.raises(TrainerError, match="No space left on device; free space"):
            for _ in range(100):
                run.train_step(lambda: False)
    again, _ = make_run(tmp_path)
    assert again.step == 1


# ------------------------------------------------------------------------------------------------------ what is in it

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "galore": {"name": "galore", "rank": 12, "period": 3, "moments": "carried"},
    "galore_plus": {"name": "galore_plus", "rank": 20, "period": 3, "residual_warmup": 2},
    "gasare": {"name": "gasare", "period": 3},
    "garare": {"name": "garare", "rank": 12, "period": 3},
    "loro": {"name": "loro", "rank": 12, "period": 3, "restart_warmup": 2},
    "dora": {"name": "dora", "rank": 12},
    "relora": {"name": "relora", "rank": 12, "period": 3, "restart_warmup": 2},
    "sltrain": {"name": "sltrain", "rank": 12},
}


def everything(run: Run) -> dict[str, Any]:
    """All that the next step may depend on."""
    values: dict[str, Any] = {}
    for name, parameter in run.model.named_parameters():
        values[name] = run.shards.read(parameter)
        values[f"{name} as the forward pass reads it"] = getattr(parameter, "ds_tensor", parameter).detach().clone()
        for key in run.shards.moments_of(parameter):
            values[f"{name}|{key}"] = run.shards.read_moment(parameter, key)
    values |= {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    values["counts"] = run.shards.counts()
    values["method"] = run.method.state()
    values["step"] = run.step
    values["batch"] = torch.cat([batch.tokens for batch in run.task.micro_batches(run.step)])
    return values


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("method", "merge"),
    [*((method, "nearest") for method in METHODS), ("galore", "fp32"), ("galore", "stochastic"), ("relora", "fp32")],
)
def test_nothing_of_a_run_is_lost_or_stale_after_a_resume(tmp_path: Path, method: str, stage: int, merge: str) -> None:
    run, _ = make_run(
        tmp_path,
        method=METHODS[method],
        deepspeed={"zero_stage": stage, "persistence_threshold": 0},
        optimisation={"dtype": "bf16", "weight_decay": 0.1, "merge": merge},
    )
    for _ in range(5):
        run.train_step(lambda: False)
    before = everything(run)
    run.save()
    again, _ = make_run(
        tmp_path,
        method=METHODS[method],
        deepspeed={"zero_stage": stage, "persistence_threshold": 0},
        optimisation={"dtype": "bf16", "weight_decay": 0.1, "merge": merge},
    )
    after = everything(again)
    assert after.keys() == before.keys()
    for key, value in before.items():
        same = torch.equal(after[key], value) if isinstance(value, torch.Tensor) else after[key] == value
        assert same, key
