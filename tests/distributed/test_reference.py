"""Through the engine, at every stage, GaLore is the paper's GaLore: the same effective weights after several switches.

The reference works on whole gradients in one process (tests/distributed/reference.py). Two ranks; fp32; the tiny
LLaMA's targets have more rows than columns (gate, up), fewer (down), and as many (q, k, v, o).
"""

from pathlib import Path

import pytest
import torch

from tests.distributed import reference
from tests.distributed.case import load_arrays, read_json, spec
from tests.distributed.group import run_group
from trainer.config import TrainingSpec
from trainer.data import Sequences, prepare
from trainer.model import build_model
from trainer.rundir import RunDir
from trainer.tokenizer import byte_tokenizer

STEPS = 8  # switches before steps 1, 4 and 7
ENGINES = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero1-offload": {"zero_stage": 1, "offload": "cpu"},
    "zero2-offload": {"zero_stage": 2, "offload": "cpu"},
    "zero3-offload": {"zero_stage": 3, "offload": "cpu"},
}
PROBLEMS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "clipped": {"clip_norm": 0.5},
    "activation-checkpointing": {"activation_checkpointing": True},
}
CASES = [
    (engine, accumulation, problem) for engine in ENGINES for accumulation in (1, 2) for problem in ("plain", "decay")
] + [(engine, 2, problem) for engine in ("zero0", "zero3") for problem in ("clipped", "activation-checkpointing")]


def make(directory: Path, engine: str, accumulation: int, problem: str, method: str = "galore") -> TrainingSpec:
    return spec(
        directory,
        deepspeed=ENGINES[engine],
        optimisation={"micro_batch": 4 // accumulation, "steps": STEPS} | PROBLEMS[problem],
        **({"method": "full"} if method == "full" else {}),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("galore")
    wanted = [(*case, "galore") for case in CASES] + [("zero0", 1, "decay", "full"), ("zero3", 2, "decay", "full")]
    cases = [
        {
            "directory": str(directory / "-".join(map(str, case))),
            "spec": make(directory, *case).model_dump(mode="json"),
            "steps": STEPS,
        }
        for case in wanted
    ]
    run_group(directory, 2, cases)
    return directory


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, torch.Tensor], list[float]]]:
    directory = tmp_path_factory.mktemp("reference")
    return {
        f"{method}-{problem}": reference_run(directory, make(directory, "zero0", 1, problem, method))
        for method, problem in [*(("galore", problem) for problem in PROBLEMS), ("full", "decay")]
    }


def reference_run(directory: Path, wanted: TrainingSpec) -> tuple[dict[str, torch.Tensor], list[float]]:
    prepare(wanted, RunDir(directory), 0, lambda _: None, lambda: False)
    whole_batch = wanted.optimisation.model_dump() | {"micro_batch": wanted.optimisation.global_batch}
    alone = TrainingSpec.model_validate(
        wanted.model_dump() | {"resources": {"processes": 1}, "optimisation": whole_batch}
    )
    sequences = Sequences(alone, directory / "data", 0, torch.device("cpu"))
    batches = [sequences.micro_batches(step)[0] for step in range(STEPS)]
    model = build_model(alone, byte_tokenizer())
    losses = reference.train(alone, model, batches)
    return {name: p.detach() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize(("engine", "accumulation", "problem"), CASES, ids=lambda value: str(value))
def test_galore_is_the_papers_at_every_stage(
    trained: Path,
    expected: dict[str, tuple[dict[str, torch.Tensor], list[float]]],
    engine: str,
    accumulation: int,
    problem: str,
) -> None:
    weights, losses = expected[f"galore-{problem}"]
    check(trained / f"{engine}-{accumulation}-{problem}-galore", weights, losses)


@pytest.mark.parametrize(("engine", "accumulation"), [("zero0", 1), ("zero3", 2)])
def test_full_is_adamw(
    trained: Path,
    expected: dict[str, tuple[dict[str, torch.Tensor], list[float]]],
    engine: str,
    accumulation: int,
) -> None:
    weights, losses = expected["full-decay"]
    check(trained / f"{engine}-{accumulation}-decay-full", weights, losses)


def check(directory: Path, weights: dict[str, torch.Tensor], losses: list[float]) -> None:
    ours = load_arrays(directory / "weights.npz")
    assert ours.keys() == weights.keys()
    deviation = {name: float((ours[name] - weights[name]).abs().max()) for name in weights}
    worst = max(deviation, key=deviation.__getitem__)
    assert deviation[worst] < 1e-5, f"{worst} deviates by {deviation[worst]:.2e}"
    events = read_json(directory / "answer.json")["events"]
    assert [e["loss"] for e in events if e["type"] == "step"] == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "zero3-offload"])
def test_three_ranks_whose_shards_do_not_divide_evenly(tmp_path: Path, engine: str) -> None:
    wanted = spec(
        tmp_path,
        deepspeed=ENGINES[engine],
        method={"rank": 11},
        optimisation={"global_batch": 6, "micro_batch": 1, "weight_decay": 0.1, "steps": STEPS},
        resources={"processes": 3},
    )
    case = {"directory": str(tmp_path / engine), "spec": wanted.model_dump(mode="json"), "steps": STEPS}
    run_group(tmp_path, 3, [case])
    check(tmp_path / engine, *reference_run(tmp_path / "reference", wanted))


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_stage_3_with_nothing_persisted_and_shapes_that_divide_by_nothing(tmp_path: Path, offload: str) -> None:
    """Below DeepSpeed's usual threshold a small parameter is never sharded, and every one of a tiny model is small."""
    from transformers import LlamaConfig

    odd = {"hidden_size": 36, "intermediate_size": 91, "num_hidden_layers": 2, "num_attention_heads": 6}
    LlamaConfig(vocab_size=261, num_key_value_heads=3, tie_word_embeddings=True, **odd).save_pretrained(
        tmp_path / "odd"
    )
    wanted = spec(
        tmp_path,
        model={"path": str(tmp_path / "odd"), "weights": "random"},
        tokenizer="bytes",
        deepspeed={"zero_stage": 3, "offload": offload},
        method={"rank": 7},
        optimisation={"micro_batch": 2, "weight_decay": 0.1, "steps": STEPS},
    )
    case = {
        "directory": str(tmp_path / "run"),
        "spec": wanted.model_dump(mode="json"),
        "steps": STEPS,
        "save_at": [5],
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }
    run_group(tmp_path, 2, [case])
    check(tmp_path / "run", *reference_run(tmp_path / "reference", wanted))


def test_the_reference_moves_far_enough_to_tell(
    expected: dict[str, tuple[dict[str, torch.Tensor], list[float]]], tmp_path: Path
) -> None:
    start = build_model(make(tmp_path, "zero0", 1, "plain"), byte_tokenizer())
    weights, losses = expected["galore-plain"]
    moved = min(float((weights[name] - p.detach()).abs().max()) for name, p in start.named_parameters())
    assert moved > 1e-3
    assert losses[-1] < losses[0] - 0.5
