"""Fine-tuning on two ranks, packed, at every ZeRO stage, is what one rank makes of the examples one by one."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.case import load_arrays, read_json
from tests.distributed.group import run_group
from tests.trainer.finetune import made

STEPS = 4
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "galore": {"name": "galore", "rank": 4, "period": 2},
    "lora": {"name": "lora", "rank": 4},
    "loro": {"name": "loro", "rank": 4, "period": 2, "restart_warmup": 1},
}
# method, stage, micro_batch, dtype
CASES = [
    ("full", 0, 4, "fp32"),
    ("full", 3, 2, "fp32"),
    ("galore", 1, 2, "fp32"),
    ("galore", 3, 1, "fp32"),
    ("lora", 2, 1, "fp32"),
    ("lora", 3, 4, "fp32"),
    ("loro", 2, 4, "fp32"),
    ("loro", 3, 2, "fp32"),
    ("galore", 2, 2, "bf16"),
]
# Both examples of a step in one row: the other rank only fills up.
FEW = {"optimisation": {"global_batch": 2}, "dataset": {"sequence_length": 128}}


def case(directory: Path, name: str, method: str, ranks: int, stage: int, **changes: Any) -> dict[str, Any]:
    optimisation = {"steps": STEPS, "global_batch": 8, "learning_rate": 0.01, "warmup_steps": 1, "epsilon": 1e-5}
    wanted = made.spec(
        directory,
        method=METHODS[method],
        deepspeed={"zero_stage": stage, "persistence_threshold": 0},
        resources={"processes": ranks},
        dataset=changes.get("dataset", {}),
        optimisation=optimisation | changes.get("optimisation", {}),
    )
    found = {"directory": str(directory / name), "spec": wanted.model_dump(mode="json"), "steps": STEPS}
    return found | {"save_at": changes.get("save_at", [])}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finetune")
    unpacked = {"dataset": {"packing": False, "sequence_length": 128}}
    alone = [case(directory, f"{method}-alone", method, 1, 0, **unpacked) for method in METHODS]
    few = FEW["optimisation"]
    alone.append(case(directory, "few-alone", "galore", 1, 0, dataset=unpacked["dataset"], optimisation=few))
    run_group(directory, 1, alone)
    both = [
        case(directory, f"{m}-{stage}-{dtype}", m, 2, stage, optimisation={"micro_batch": micro, "dtype": dtype})
        for m, stage, micro, dtype in CASES
    ]
    both.append(case(directory, "few", "galore", 2, 3, **FEW))
    both += [
        case(directory, f"{method}-resumed", method, 2, stage, save_at=[2], optimisation={"micro_batch": micro})
        for method, stage, micro in RESUMED
    ]
    run_group(directory, 2, both)
    return directory


RESUMED = [("galore", 3, 1), ("lora", 2, 1)]


def told(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_json(directory / "answer.json")["events"] if event["type"] == kind]


def figures(directory: Path) -> list[float]:
    return [event["loss"] for event in told(directory, "step") + told(directory, "evaluated")]


def furthest(one: Path, other: Path) -> float:
    ours, theirs = (load_arrays(directory / "weights.npz") for directory in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize(("method", "stage", "micro", "dtype"), CASES)
def test_packed_on_two_ranks_it_is_one_rank_without(
    trained: Path, method: str, stage: int, micro: int, dtype: str
) -> None:
    ours, alone = trained / f"{method}-{stage}-{dtype}", trained / f"{method}-alone"
    assert figures(ours) == pytest.approx(figures(alone), rel=2e-5 if dtype == "fp32" else 0.05)
    if dtype == "fp32":
        assert furthest(ours, alone) < 2e-4
    for ours_step, theirs in zip(told(ours, "step"), told(alone, "step"), strict=True):
        assert ours_step["tokens"] == theirs["tokens"]
        assert ours_step["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.02 if dtype == "fp32" else 0.1)


def test_a_rank_that_only_fills_up_changes_nothing(trained: Path) -> None:
    assert figures(trained / "few") == pytest.approx(figures(trained / "few-alone"), rel=2e-5)
    assert furthest(trained / "few", trained / "few-alone") < 2e-4


@pytest.mark.parametrize("method", [method for method, _, _ in RESUMED])
def test_resumed_losses_and_weights_are_bit_equal(trained: Path, method: str) -> None:
    stage = next(stage for name, stage, _ in RESUMED if name == method)
    straight, resumed = trained / f"{method}-{stage}-fp32", trained / f"{method}-resumed"
    assert figures(resumed) == figures(straight)
    assert furthest(resumed, straight) == 0.0
