"""Every method through DeepSpeed, on two ranks, is its paper's within 1e-5, and goes on so after a resume.

fp32, ZeRO 0, 2, 3 with activation checkpointing, and 3 with the optimizer's state on the CPU; in the middle of a period
a checkpoint is written and everything made anew from it. The references (tests/reference) work on whole gradients in
one process.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.case import load_arrays, read_json, spec
from tests.distributed.group import run_group
from tests.distributed.test_reference import ENGINES, check
from tests.reference.product import reference_run
from trainer.config import TrainingSpec
from trainer.data import Sequences, prepare
from trainer.memory import memory, model_of
from trainer.model import build_model
from trainer.presets import PRESETS
from trainer.rundir import RunDir
from trainer.tokenizer import byte_tokenizer

STEPS, MIDDLE = 9, 5
RANKED, PERIODIC = {"rank": 12}, {"rank": 12, "period": 3}
METHODS: dict[str, dict[str, Any]] = {
    "full-msgd": {"name": "full", "optimizer": "msgd"},
    "galore-randomized": {"name": "galore", "svd": "randomized"} | PERIODIC,
    "galore-msgd-carried": {"name": "galore", "optimizer": "msgd", "moments": "carried", "alpha": 50} | PERIODIC,
    "galore-large-batch": {"name": "galore", "switch_batches": 2, "moments": "reset"} | PERIODIC,
    "golore": {"name": "golore", "random_fraction": 0.5} | PERIODIC,
    "galore_plus": {"name": "galore_plus", "rank": 20, "period": 3, "residual_warmup": 2},
    "gasare": {"name": "gasare", "period": 3},
    "gosare": {"name": "gosare", "period": 3},
    "flora": {"name": "flora"} | PERIODIC,
    "garare": {"name": "garare"} | PERIODIC,
    "garare-pinv": {"name": "garare", "back_projection": "pinv"} | PERIODIC,
    "loro": {"name": "loro", "restart_warmup": 2} | PERIODIC,
    "loro-preconditioned": {"name": "loro", "between": "preconditioned", "restart_warmup": 2} | PERIODIC,
    "lowrank": {"name": "lowrank"} | RANKED,
    "lora": {"name": "lora"} | RANKED,
    "dora": {"name": "dora"} | RANKED,
    "relora": {"name": "relora", "prune": 0.5, "restart_warmup": 2} | PERIODIC,
    "sltrain": {"name": "sltrain"} | RANKED,
}
# Momentum SGD moves by the gradient's size; inverses multiply float32's rounding.
RATES = {"full-msgd": 0.1, "loro-preconditioned": 0.003}
STAGES = ["zero0", "zero2", "zero3", "zero3-offload"]
# Nothing to be equal to in bf16: close to the reference's losses, and the resume bit-equal.
BF16, STRAIGHT = "zero2-bf16", "-straight"


def make(directory: Path, method: str, engine: str) -> TrainingSpec:
    return spec(
        directory,
        method=METHODS[method],
        deepspeed={"zero_stage": 2} if engine == BF16 else ENGINES[engine],
        optimisation={
            "dtype": "bf16" if engine == BF16 else "fp32",
            # Where every layer's own backward pass has parameters gathered and activations computed again.
            "activation_checkpointing": engine == "zero3",
            "steps": STEPS,
            "micro_batch": 2,
            "weight_decay": 0.1,
            "learning_rate": RATES.get(method, 0.01),
        },
    )


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(engine, directory with a run of every method), for the engine that a test asks for: one group of ranks each."""
    engine: str = request.param
    directory = tmp_path_factory.mktemp(engine)
    cases: list[dict[str, Any]] = [
        {
            "directory": str(directory / method),
            "spec": make(directory, method, engine).model_dump(mode="json"),
            "steps": STEPS,
            "save_at": [MIDDLE],
        }
        for method in METHODS
    ]
    if engine == BF16:
        cases += [case | {"directory": case["directory"] + STRAIGHT, "save_at": []} for case in cases]
    run_group(directory, 2, cases)
    return engine, directory


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, torch.Tensor], list[float]]]:
    directory = tmp_path_factory.mktemp("references")
    return {method: whole_batch_run(directory / method, make(directory, method, "zero0")) for method in METHODS}


def whole_batch_run(directory: Path, wanted: TrainingSpec) -> tuple[dict[str, torch.Tensor], list[float]]:
    prepare(wanted, RunDir(directory), 0, lambda _: None, lambda: False)
    alone = TrainingSpec.model_validate(wanted.model_dump() | {"resources": {"processes": 1}})
    sequences = Sequences(alone, directory / "data", 0, torch.device("cpu"))
    batches = [torch.cat(sequences.micro_batches(step)) for step in range(STEPS)]
    return reference_run(alone, build_model(alone, byte_tokenizer()), batches)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trained", STAGES, indirect=True)
def test_a_method_is_its_papers_at_every_stage_and_after_a_resume(
    trained: tuple[str, Path], references: dict[str, tuple[dict[str, torch.Tensor], list[float]]], method: str
) -> None:
    check(trained[1] / method, *references[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trained", [BF16], indirect=True)
def test_in_bf16_losses_are_close_and_a_resume_is_bit_equal(
    trained: tuple[str, Path], references: dict[str, tuple[dict[str, torch.Tensor], list[float]]], method: str
) -> None:
    resumed, straight = trained[1] / method, trained[1] / (method + STRAIGHT)
    assert losses(resumed) == losses(straight)
    expected, got = load_arrays(straight / "weights.npz"), load_arrays(resumed / "weights.npz")
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert losses(straight) == pytest.approx(references[method][1], abs=0.05)


def losses(directory: Path) -> list[float]:
    return [e["loss"] for e in read_json(directory / "answer.json")["events"] if e["type"] == "step"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trained", STAGES, indirect=True)
def test_a_rank_holds_what_the_calculator_says(trained: tuple[str, Path], tmp_path: Path, method: str) -> None:
    """Shards are padded, to a multiple of the ranks and of an alignment: up to 2 % of so small a model."""
    engine, directory = trained
    live = read_json(directory / method / "answer.json")["live"]
    spec = make(tmp_path, method, engine)
    found = memory(
        spec.method,
        model_of(PRESETS["llama-tiny"], vocabulary=257),
        dtype="fp32",
        zero_stage=spec.deepspeed.zero_stage,
        offload=spec.deepspeed.offload,
        processes=2,
    )
    shards = found.host if engine.endswith("offload") else found.device
    assert live["parameters"] == pytest.approx(found.device.weights + found.device.basis, rel=0.02)
    assert live["buffers"] == found.device.buffers
    assert live["masters"] == pytest.approx(shards.masters, rel=0.02)
    assert live["moments"] == pytest.approx(shards.moments, rel=0.02)
