"""A run that was checkpointed and made again from the files goes on as if nothing had happened.

Between the two halves everything is built anew: model, engine, optimizer state, method. The checkpoint is written in
the middle of a period, so that core, basis, moments and the decay scalar all carry something.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.case import load_arrays, read_json, spec
from tests.distributed.group import run_group

STEPS, MIDDLE = 8, 5
SAME = {
    "zero0": {"deepspeed": {"zero_stage": 0}},
    "zero1": {"deepspeed": {"zero_stage": 1}},
    "zero2": {"deepspeed": {"zero_stage": 2}},
    "zero3": {"deepspeed": {"zero_stage": 3}},
    "zero2-offload": {"deepspeed": {"zero_stage": 2, "offload": "cpu"}},
    "zero3-offload": {"deepspeed": {"zero_stage": 3, "offload": "cpu"}},
    "zero2-full": {"deepspeed": {"zero_stage": 2}, "method": "full"},
    "zero2-randomized": {"deepspeed": {"zero_stage": 2}, "method": {"svd": "randomized"}},
    "zero1-bf16": {"deepspeed": {"zero_stage": 1}, "optimisation": {"dtype": "bf16"}},
    "zero2-bf16": {"deepspeed": {"zero_stage": 2}, "optimisation": {"dtype": "bf16"}},
    "zero3-bf16": {"deepspeed": {"zero_stage": 3}, "optimisation": {"dtype": "bf16"}},
}
# From one engine into another: the checkpoint knows neither stage nor offload.
OTHER = {"zero2→zero3-offload": ("zero2", "zero3-offload"), "zero3→zero0": ("zero3", "zero0")}


def changes(name: str) -> dict[str, Any]:
    wanted = {key: dict(value) if isinstance(value, dict) else value for key, value in SAME[name].items()}
    wanted["optimisation"] = {"micro_batch": 2, "weight_decay": 0.1} | wanted.get("optimisation", {})
    return wanted


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume")
    cases = []
    for name in SAME:
        wanted = spec(directory, **changes(name)).model_dump(mode="json")
        cases.append({"directory": str(directory / f"{name}-straight"), "spec": wanted, "steps": STEPS})
        cases.append(cases[-1] | {"directory": str(directory / f"{name}-resumed"), "save_at": [MIDDLE]})
    for name, (first, then) in OTHER.items():
        cases.append(
            {
                "directory": str(directory / name),
                "spec": spec(directory, **changes(first)).model_dump(mode="json"),
                "resume_as": spec(directory, **changes(then)).model_dump(mode="json"),
                "steps": STEPS,
                "save_at": [MIDDLE],
            }
        )
    run_group(directory, 2, cases)
    return directory


def losses(directory: Path) -> list[float]:
    return [e["loss"] for e in read_json(directory / "answer.json")["events"] if e["type"] == "step"]


@pytest.mark.parametrize("name", SAME)
def test_resumed_losses_and_weights_are_bit_equal(trained: Path, name: str) -> None:
    # bf16 too: torch's AdamW works on the fp32 masters, which the checkpoint holds; the low-precision copy is their
    # rounding. (DeepSpeed's compiled CPU Adam, which we do not use, is not exact after a resume.)
    straight, resumed = trained / f"{name}-straight", trained / f"{name}-resumed"
    assert len(losses(straight)) == STEPS
    assert losses(resumed) == losses(straight)
    expected, got = load_arrays(straight / "weights.npz"), load_arrays(resumed / "weights.npz")
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", OTHER)
def test_resumed_by_another_engine_goes_on_the_same(trained: Path, name: str) -> None:
    assert losses(trained / name) == pytest.approx(losses(trained / f"{OTHER[name][0]}-straight"), abs=1e-6)


def test_optimizer_state_is_counted_once(trained: Path) -> None:
    """One copy of the moments of the cores and of everything else that is trained, however they are sharded."""
    layers, d, ffn, r, vocabulary = 2, 64, 176, 12, 257
    cores = layers * r * (4 * d + 3 * ffn)  # the long side of each matrix
    others = 2 * vocabulary * d + (2 * layers + 1) * d
    for name in ("zero0", "zero2", "zero3"):
        counted = read_json(trained / f"{name}-straight" / "answer.json")["state_bytes"]
        # Shards are padded to a multiple of the ranks and of an alignment.
        assert counted == pytest.approx(2 * 4 * (cores + others), rel=0.01), name
