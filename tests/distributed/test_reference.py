"""Clipped through the engine, GaLore and AdamW are the papers'; what is clipped is the gradient that is seen, PᵀG.

The reference works on whole gradients in one process (tests/distributed/reference.py). Two ranks; fp32; the tiny
LLaMA's targets have more rows than columns (gate, up), fewer (down), and as many (q, k, v, o). Without clipping, see
test_matrix.py.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed import reference
from tests.distributed.case import load_arrays, read_json, spec
from tests.distributed.group import run_group
from tests.distributed.matrix import ENGINES
from trainer.config import TrainingSpec
from trainer.data import Sequences
from trainer.model import build_model
from trainer.prepare import prepare
from trainer.rundir import RunDir
from trainer.tokenizer import byte_tokenizer

STEPS = 8  # switches before steps 1, 4 and 7
PROBLEMS = {"clipped": {"clip_norm": 0.5}, "clipped-decay": {"clip_norm": 0.5, "weight_decay": 0.1}}
METHODS = ("galore", "full")
# Where DeepSpeed clips by other code.
CLIPPING = ("0", "1", "2, offload", "3", "3, offload all")
CASES = [(engine, accumulation, problem) for engine in CLIPPING for accumulation, problem in enumerate(PROBLEMS, 1)]


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
    wanted = [(*case, method) for case in CASES for method in METHODS]
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
        f"{method}-{problem}": reference_run(directory, make(directory, "0", 1, problem, method))
        for method in METHODS
        for problem in PROBLEMS
    }


def reference_run(directory: Path, wanted: TrainingSpec) -> tuple[dict[str, torch.Tensor], list[float]]:
    prepare(wanted, RunDir(directory), 0, lambda _: None, lambda: False)
    whole_batch = wanted.optimisation.model_dump() | {"micro_batch": wanted.optimisation.global_batch}
    alone = TrainingSpec.model_validate(
        wanted.model_dump() | {"resources": {"processes": 1}, "optimisation": whole_batch}
    )
    sequences = Sequences(alone, directory / "data", 0, torch.device("cpu"))
    batches = [sequences.micro_batches(step)[0].tokens for step in range(STEPS)]
    model = build_model(alone, byte_tokenizer())
    losses = reference.train(alone, model, batches)
    return {name: p.detach() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("engine", "accumulation", "problem"), CASES, ids=lambda value: str(value))
def test_clipped_it_is_the_papers_at_every_stage(
    trained: Path,
    expected: dict[str, tuple[dict[str, torch.Tensor], list[float]]],
    engine: str,
    accumulation: int,
    problem: str,
    method: str,
) -> None:
    check(trained / f"{engine}-{accumulation}-{problem}-{method}", *expected[f"{method}-{problem}"])


def check(directory: Path, weights: dict[str, torch.Tensor], losses: list[float]) -> None:
    ours = load_arrays(directory / "weights.npz")
    assert ours.keys() == weights.keys()
    deviation = {name: float((ours[name] - weights[name]).abs().max()) for name in weights}
    worst = max(deviation, key=deviation.__getitem__)
    assert deviation[worst] < 1e-5, f"{worst} deviates by {deviation[worst]:.2e}"
    events = read_json(directory / "answer.json")["events"]
    assert [e["loss"] for e in events if e["type"] == "step"] == pytest.approx(losses, abs=1e-5)


def test_the_reference_moves_far_enough_to_tell(
    expected: dict[str, tuple[dict[str, torch.Tensor], list[float]]], tmp_path: Path
) -> None:
    start = build_model(make(tmp_path, "0", 1, "clipped"), byte_tokenizer())
    weights, losses = expected["galore-clipped"]
    moved = min(float((weights[name] - p.detach()).abs().max()) for name, p in start.named_parameters())
    assert moved > 1e-3
    assert losses[-1] < losses[0] - 0.5
