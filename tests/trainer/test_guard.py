"""A loss that goes wrong: what is noticed, and that a run goes back, on, and to a good end."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.distributed.case import spec
from tests.trainer.alone import alone, make_run
from tests.trainer.test_checkpoint import METHODS
from trainer import events
from trainer.checkpoint import place as places
from trainer.checkpoint.place import Directory
from trainer.config import TrainingSpec
from trainer.errors import DivergenceError, RolledBackError
from trainer.guard import Guard, GuardSpec, Spike
from trainer.run import Run
from trainer.rundir import RunDir
from trainer.schedule import learning_rate
from trainer.train import _loop
from trainer.zero import shape_of

# ------------------------------------------------------------------------------------------------------- the detector


def noisy(steps: int, seed: int = 0, level: float = 2.0) -> list[float]:
    """Like a run's: falling, with noise of a fiftieth."""
    draw = random.Random(seed)
    return [level + 3.5 * math.exp(-step / 40) + draw.gauss(0, level / 50) for step in range(steps)]


def spikes(guard: Guard, losses: list[float]) -> dict[int, Spike]:
    """By the index of the loss that was one."""
    found = {index: guard.observe(loss) for index, loss in enumerate(losses)}
    return {index: spike for index, spike in found.items() if spike is not None}


@pytest.mark.parametrize("seed", range(5))
def test_the_noise_of_a_run_is_no_spike(seed: int) -> None:
    assert spikes(Guard(GuardSpec(), {}), noisy(3000, seed)) == {}


@pytest.mark.parametrize("patience", [1, 3, 5])
def test_a_spike_is_told_when_the_loss_has_been_high_for_as_many_steps_as_patience_says(patience: int) -> None:
    wanted = GuardSpec(patience=patience)
    losses = noisy(200)
    found = spikes(Guard(wanted, {}), losses + patience * [7.0])
    assert list(found) == [200 + patience - 1]
    [spike] = found.values()
    assert spike.usual == pytest.approx(sum(losses[-64:]) / 64)
    assert spike.deviations > wanted.spike
    # One ordinary step in between, and it is none.
    assert spikes(Guard(wanted, {}), [*losses, *(patience - 1) * [7.0], 2.0, *(patience - 1) * [7.0]]) == {}


def test_how_high_is_high_is_counted_in_deviations_of_the_ordinary_losses() -> None:
    window = [1.9, 2.1] * 32  # mean 2, deviation 0.1
    for above, expected in ((7.9, False), (8.1, True)):
        assert bool(spikes(Guard(GuardSpec(patience=1), {}), [*window, 2 + above * 0.1])) == expected
    # What hardly varies at all: hundredths of the mean.
    for above, expected in ((7.9, False), (8.1, True)):
        assert bool(spikes(Guard(GuardSpec(patience=1), {}), [*64 * [2.0], 2 + above * 0.02])) == expected


def test_high_losses_do_not_become_usual_while_they_are_counted() -> None:
    guard = Guard(GuardSpec(patience=50), {})
    assert list(spikes(guard, noisy(200) + 50 * [7.0])) == [249]


def test_nothing_is_a_spike_before_half_a_window_is_known() -> None:
    assert spikes(Guard(GuardSpec(window=64, patience=1), {}), 31 * [2.0] + [100.0]) == {}
    assert list(spikes(Guard(GuardSpec(window=64, patience=1), {}), 32 * [2.0] + [100.0])) == [32]


def test_a_level_is_told_once_and_a_second_one_again() -> None:
    found = spikes(Guard(GuardSpec(), {}), noisy(200) + noisy(200, 1, level=6.0) + noisy(200, 2, level=30.0))
    assert list(found) == [202, 402]


def test_a_guard_from_a_checkpoint_decides_like_one_that_was_never_stopped() -> None:
    losses = noisy(60) + [9.0, 2.0] + noisy(40, 1) + 3 * [9.0] + noisy(80, 2, level=9.0) + 3 * [60.0]
    straight, wanted = Guard(GuardSpec(window=16), {}), GuardSpec(window=16)
    expected = spikes(straight, losses)
    assert len(expected) >= 2
    resumed, found = Guard(wanted, {}), {}
    for index, loss in enumerate(losses):
        resumed = Guard(wanted, json.loads(json.dumps(resumed.state())))
        if spike := resumed.observe(loss):
            found[index] = spike
    assert found == expected
    assert resumed.state() == straight.state()


# ---------------------------------------------------------------------------------------------------------- the spec


def test_a_spec_that_knows_of_no_guard_has_the_defaults(tmp_path: Path) -> None:
    stored = json.loads(spec(tmp_path).model_dump_json())
    del stored["guard"]
    read = TrainingSpec.model_validate(stored)
    assert read == spec(tmp_path)
    assert (read.guard.on_divergence, read.guard.on_spike) == ("stop", "report")


@pytest.mark.parametrize(
    "wrong",
    [{"spike": 0}, {"window": 7}, {"patience": 0}, {"rate_factor": 1}, {"most_rollbacks": 0}, {"on_spike": "ignore"}],
)
def test_what_is_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GuardSpec.model_validate(wrong)


# ------------------------------------------------------------------------------------------------------------- a run

BACK = {"on_divergence": "roll_back"}
# The rate rises for all of the run, to fifty times what is good: the loss falls, wavers, and leaves.
RISING: dict[str, Any] = {
    "method": "full",
    "optimisation": {"steps": 60, "learning_rate": 2.0, "warmup_steps": 60},
    "checkpoints": {"every": 5},
    "guard": {"on_spike": "roll_back", "window": 8, "spike": 4, "patience": 2, "rate_factor": 0.01},
}


class Asked:
    """A stop request when `run` has made `steps` steps."""

    def __init__(self, run: Run, steps: int | None) -> None:
        self._run, self._steps = run, steps

    def present(self) -> bool:
        return self._run.step + 1 == self._steps


def train(directory: Path, *stops: int, **changes: Any) -> list[events.Event]:
    """Through the loop to the end, started again after each rollback, and after a stop at each of `stops`."""
    told: list[events.Event] = []
    left = [*stops, None]
    while left:
        run, found = make_run(directory, **changes)
        try:
            if _loop(run, Asked(run, left[0])):  # type: ignore[arg-type]
                left.clear()
            else:
                left.pop(0)
        except RolledBackError as back:
            assert back.step < run.step
        finally:
            told += found
    return told


def story(told: list[events.Event]) -> list[Any]:
    """What happened, without the times that it took."""
    kept = {"step", "from_step", "loss", "learning_rate", "rate_scale", "usual", "deviations", "reason", "type"}
    kinds = events.Step | events.Spiked | events.RolledBack
    return [event.model_dump(include=kept) for event in told if isinstance(event, kinds)]


def spoil(run: Run) -> None:
    """From now on the loss is no number."""
    norm = next(p for n, p in run.model.named_parameters() if n.endswith("norm.weight"))
    run.shards.write(norm, torch.full(shape_of(norm), float("nan")))


def go(run: Run, steps: int) -> None:
    for _ in range(steps):
        run.train_step(lambda: False)


def complete(directory: Path) -> list[int]:
    return Directory(RunDir(directory / "run").checkpoints).complete_steps()


@pytest.mark.usefixtures("process_group")
def test_a_run_that_spikes_goes_back_and_on_with_a_smaller_rate_to_a_good_end(tmp_path: Path) -> None:
    told = train(tmp_path, **RISING)
    [back] = [e for e in told if isinstance(e, events.RolledBack)]
    [spiked] = [e for e in told if isinstance(e, events.Spiked)]
    assert back.step < spiked.step - 2 < spiked.step == back.from_step
    assert back.step % 5 == 0
    assert back.rate_scale == 0.01
    before, after = told[: told.index(back)], told[told.index(back) :]
    first, last = ([e for e in part if isinstance(e, events.Step)] for part in (before, after))
    assert [e.step for e in first] == list(range(1, back.from_step + 1))
    assert [e.step for e in last] == list(range(back.step + 1, 61))
    optimisation = alone(tmp_path, **RISING).optimisation
    assert [e.learning_rate for e in first] == [learning_rate(e.step, optimisation) for e in first]
    assert [e.learning_rate for e in last] == pytest.approx(
        [0.01 * learning_rate(e.step, optimisation) for e in last], rel=1e-12
    )
    assert last[-1].loss < first[0].loss < spiked.loss


@pytest.mark.usefixtures("process_group")
def test_stopped_before_and_after_a_rollback_it_has_the_same_losses_to_the_bit(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", **RISING)
    [back] = [e for e in straight if isinstance(e, events.RolledBack)]
    assert 10 < back.step < 45
    stopped = train(tmp_path / "stopped", back.step, back.step + 5, **RISING)
    assert sum(isinstance(e, events.Started) for e in stopped) == 4
    assert story(stopped) == story(straight)


@pytest.mark.usefixtures("process_group")
def test_by_default_a_spike_is_reported_and_trained_on(tmp_path: Path) -> None:
    changes = RISING | {"guard": RISING["guard"] | {"on_spike": "report"}}
    told = train(tmp_path, **changes)
    assert [e for e in told if isinstance(e, events.Spiked)]
    assert [e.step for e in told if isinstance(e, events.Step)] == list(range(1, 61))
    assert 0 not in complete(tmp_path)


@pytest.mark.usefixtures("process_group")
def test_a_run_that_is_to_stop_at_a_spike_says_what_is_usual_and_what_to_do(tmp_path: Path) -> None:
    changes = RISING | {"guard": RISING["guard"] | {"on_spike": "stop"}}
    expected = r"step \d+: loss \S+, \S+ standard deviations above the usual \S+, .*lower optimisation.learning_rate"
    with pytest.raises(DivergenceError, match=expected):
        train(tmp_path, **changes)


@pytest.mark.usefixtures("process_group")
def test_it_goes_back_to_before_the_weights_that_the_wrong_loss_is_of(tmp_path: Path) -> None:
    changes = {"checkpoints": {"keep": 3}, "guard": BACK}
    run, found = make_run(tmp_path, **changes)
    for _ in range(3):
        go(run, 1)
        run.save()
    spoil(run)
    run.save()  # of step 3 again: whole, and of no use
    with pytest.raises(RolledBackError, match="started again, the run goes on from step 2") as back:
        go(run, 1)
    assert back.value.step == 2
    assert complete(tmp_path) == [1, 2]
    assert isinstance(found[-1], events.RolledBack)
    again, _ = make_run(tmp_path, **changes)
    assert (again.step, again.guard.rate_scale, again.guard.rollbacks) == (2, 0.5, 1)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("good", [True, False])
def test_a_checkpoint_on_its_way_is_committed_first_if_it_is_good(tmp_path: Path, good: bool) -> None:
    run, _ = make_run(tmp_path, guard=BACK)
    go(run, 1)
    run.save()
    go(run, 1)
    if good:
        run.save(wait=False)
        spoil(run)
        # With these weights: as if a step had been made meanwhile.
        run.step += 1
    else:
        spoil(run)
        run.save(wait=False)
    with pytest.raises(RolledBackError):
        go(run, 1)
    assert complete(tmp_path) == ([1, 2] if good else [1])


@pytest.mark.usefixtures("process_group")
def test_a_checkpoint_that_was_gone_back_to_twice_gives_way_to_the_one_before(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, guard=BACK)
    for _ in range(2):
        go(run, 1)
        run.save()
    scales = []
    for expected in (2, 1, 1):
        go(run, 2)
        spoil(run)
        with pytest.raises(RolledBackError):
            go(run, 1)
        run, _ = make_run(tmp_path, guard=BACK)
        assert run.step == expected
        scales.append(run.guard.rate_scale)
    assert scales == [0.5, 0.25, 0.125]
    assert complete(tmp_path) == [1]
    go(run, 2)
    run.save()  # what is behind a rollback knows of it without the record
    run, _ = make_run(tmp_path, guard=BACK)
    assert (run.step, run.guard.rate_scale, run.guard.rollbacks) == (3, 0.125, 3)
    spoil(run)
    with pytest.raises(DivergenceError, match=r"has gone back 3 times, guard.most_rollbacks allows no more.* 0.125 ×"):
        go(run, 1)
    assert complete(tmp_path) == [1, 3]


@pytest.mark.usefixtures("process_group")
def test_without_a_checkpoint_of_before_it_fails_and_leaves_what_is_there(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, guard=BACK)
    go(run, 1)
    spoil(run)
    run.save()
    with pytest.raises(DivergenceError, match="no checkpoint of before is left"):
        go(run, 1)
    assert complete(tmp_path) == [1]


@pytest.mark.usefixtures("process_group")
def test_amid_high_steps_no_checkpoint_is_dropped(tmp_path: Path) -> None:
    changes = RISING | {"checkpoints": {"every": 1, "keep": 2, "keep_best": False}}
    changes["guard"] = RISING["guard"] | {"patience": 4}
    told = train(tmp_path, **changes)
    backs = [e for e in told if isinstance(e, events.RolledBack)]
    assert backs
    assert all(back.step < back.from_step - 4 for back in backs)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("stage", "dtype"), [*((stage, "fp32") for stage in range(4)), *((stage, "bf16") for stage in range(1, 4))]
)
def test_a_gradient_that_is_no_number_is_noticed_though_the_loss_is_one(tmp_path: Path, stage: int, dtype: str) -> None:
    run, found = make_run(tmp_path, deepspeed={"zero_stage": stage}, optimisation={"dtype": dtype})
    go(run, 1)

    def spoil_gradient(module: Any, given: Any, answer: torch.Tensor) -> None:
        answer.register_hook(lambda gradient: gradient * float("nan"))

    run.model.get_submodule("model.norm").register_forward_hook(spoil_gradient)
    with pytest.raises(DivergenceError, match=r"step 2: loss \d.*gradient norm (nan|inf)"):
        go(run, 1)
    assert [e.step for e in found if isinstance(e, events.Step)] == [1]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_step_0_is_the_beginning(tmp_path: Path, method: str) -> None:
    changes: dict[str, Any] = {"method": METHODS[method], "guard": BACK}
    straight = make_run(tmp_path / "straight", **changes)
    saved = make_run(tmp_path / "saved", **changes)
    saved[0].save()
    resumed = make_run(tmp_path / "saved", **changes)
    assert (resumed[0].step, resumed[0].resumed, saved[0].resumed) == (0, True, False)
    for run, _ in (straight, resumed):
        go(run, 4)
    assert story(straight[1]) == story(resumed[1])


@pytest.mark.usefixtures("process_group")
def test_a_checkpoint_of_an_earlier_version_has_a_fresh_guard(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    go(run, 3)
    run.save()
    file = RunDir(tmp_path / "run").checkpoint(3) / "state.json"
    state = json.loads(file.read_text())
    assert len(state.pop("guard")["losses"]) == 3
    file.write_text(json.dumps(state))
    again, _ = make_run(tmp_path)
    assert again.step == 3
    assert again.guard.state() == Guard(GuardSpec(), {}).state()


def test_a_check_of_the_place_leaves_a_checkpoint_of_step_0_alone(tmp_path: Path) -> None:
    place = Directory(tmp_path / "checkpoints")
    places.check(place)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    for name in ("state.json", "COMPLETE"):
        place.write(0, name, b"{}")
    places.check(place)
    assert {path.name for path in (tmp_path / "checkpoints" / "step-00000000").iterdir()} == {"state.json", "COMPLETE"}
