"""A run that was checkpointed and made again from the files goes on as if nothing had happened: bit for bit on as many
ranks, to 1e-6 on another number of them, at another stage, or offloaded.

Between the two halves everything is built anew: model, engine, optimizer state, method. The checkpoint is written in
the middle of a period, so that core, basis, moments and the decay scalar all carry something.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.case import load_arrays, read_json
from tests.distributed.group import run_group
from tests.distributed.matrix import METHODS, STEPS, Case
from trainer.methodconfig import METHOD_CONFIGS, ReloraConfig, SubspaceSettings

MIDDLE = 3
SAME = ("fp32", "bf16")
# What make test trains; make test-matrix all methods in all ways.
USUAL = {
    "fp32": ("full", "galore", "galore_plus", "loro", "lora"),
    "bf16": ("galore, large batch", "gasare", "garare, pinv", "relora", "sltrain"),
}
# (engine, ranks, accumulation, recomputing) that go on with what two ranks at stage 2 have written.
OTHERS = {
    "1 rank at stage 0": ("0", 1, 2, False),
    "2 ranks at stage 1": ("1", 2, 2, True),
    "3 ranks at stage 3, offloaded": ("3, offload all", 3, 1, True),
}


def marked(values: tuple[str, ...], usual: Callable[[str, str], bool]) -> list[Any]:
    return [
        pytest.param(method, value, marks=[] if usual(method, value) else [pytest.mark.matrix])
        for method in METHODS
        for value in values
    ]


def wanted_by(request: pytest.FixtureRequest, argument: str) -> list[tuple[str, str]]:
    """The (method, value) that this session's tests ask for."""
    params = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    return list(dict.fromkeys((p["method"], p[argument]) for p in params if argument in p))


def start(method: str, dtype: str) -> Case:
    merges = issubclass(METHOD_CONFIGS[METHODS[method]["name"]], SubspaceSettings | ReloraConfig)
    if dtype == "fp32":
        return Case(method, "2", "fp32", 2, 1, False)
    return Case(method, "3, offload", "bf16, fp32 copy" if merges else "bf16", 2, 2, False)


def case(directory: Path, name: str, wanted: Case, **more: Any) -> dict[str, Any]:
    return {
        "directory": str(directory / name),
        "spec": wanted.spec(directory).model_dump(mode="json"),
        "steps": STEPS,
    } | more


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume")
    cases = []
    resized = [(method, "fp32") for method, _ in wanted_by(request, "name")]
    for method, dtype in dict.fromkeys([*wanted_by(request, "dtype"), *resized]):
        wanted = start(method, dtype)
        cases.append(case(directory, f"{method}-{dtype}-straight", wanted))
        cases.append(case(directory, f"{method}-{dtype}-resumed", wanted, save_at=[MIDDLE]))
    run_group(directory, 2, cases, timeout=60 + 10 * len(cases))
    return directory


@pytest.fixture(scope="module")
def resized(request: pytest.FixtureRequest, trained: Path) -> Path:
    for name, (engine, ranks, accumulation, recomputing) in OTHERS.items():
        cases = []
        for method in [method for method, other in wanted_by(request, "name") if other == name]:
            wanted = Case(method, engine, "fp32", ranks, accumulation, recomputing)
            cases.append(case(trained, f"{method}-{name}", wanted))
            shutil.copytree(trained / f"{method}-fp32-resumed", trained / f"{method}-{name}")
        if cases:
            run_group(trained, ranks, cases, timeout=60 + 10 * len(cases))
    return trained


def losses(directory: Path) -> list[float]:
    return [e["loss"] for e in read_json(directory / "answer.json")["events"] if e["type"] == "step"]


@pytest.mark.parametrize(("method", "dtype"), marked(SAME, lambda method, dtype: method in USUAL[dtype]))
def test_resumed_losses_and_weights_are_bit_equal(trained: Path, method: str, dtype: str) -> None:
    # bf16 too: torch's AdamW works on the fp32 masters, which the checkpoint holds; the low-precision copy is their
    # rounding. (DeepSpeed's compiled CPU Adam, which we do not use, is not exact after a resume.)
    straight, resumed = trained / f"{method}-{dtype}-straight", trained / f"{method}-{dtype}-resumed"
    assert len(losses(straight)) == STEPS
    assert losses(resumed) == losses(straight)
    expected, got = load_arrays(straight / "weights.npz"), load_arrays(resumed / "weights.npz")
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def usually_resized(method: str, name: str) -> bool:
    return method == "galore" or (name.startswith("3") and method in USUAL["fp32"])


@pytest.mark.parametrize(("method", "name"), marked(tuple(OTHERS), usually_resized))
def test_other_ranks_at_another_stage_go_on_the_same(resized: Path, method: str, name: str) -> None:
    straight, other = resized / f"{method}-fp32-straight", resized / f"{method}-{name}"
    assert losses(other) == pytest.approx(losses(straight)[MIDDLE:], rel=1e-6)
    expected, got = load_arrays(straight / "weights.npz"), load_arrays(other / "weights.npz")
    assert max(float((got[key] - expected[key]).abs().max()) for key in expected) < 1e-5


def test_optimizer_state_is_counted_once(trained: Path) -> None:
    """One copy of the moments of the cores and of everything else that is trained, however they are sharded."""
    layers, d, ffn, r, vocabulary = 2, 20, 35, 7, 261
    cores = layers * r * (4 * d + 3 * ffn)  # the long side of each matrix
    others = vocabulary * d + (2 * layers + 1) * d
    counted = read_json(trained / "galore-fp32-straight" / "answer.json")["state_bytes"]
    # Shards are padded to a multiple of the ranks and of an alignment.
    assert counted == pytest.approx(2 * 4 * (cores + others), rel=0.01)
