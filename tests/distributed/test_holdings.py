"""What a rank holds of parameters, masters and moments is what trainer.memory calculates."""

from pathlib import Path

import pytest

from tests.distributed.case import read_json, spec
from tests.distributed.group import run_group
from tests.distributed.matrix import ENGINES, METHODS, TYPES
from trainer.combinations import combination_problem
from trainer.config import TrainingSpec
from trainer.memory import memory, model_of
from trainer.presets import PRESETS

PLACES = ["2", "3, offload all"]
CASES = [(method, engine, "fp32") for method in METHODS for engine in PLACES] + [
    ("galore", engine, "bf16, fp32 copy") for engine in PLACES
]


def make(directory: Path, method: str, engine: str, dtype: str) -> TrainingSpec:
    return spec(
        directory,
        method=METHODS[method],
        deepspeed=ENGINES[engine],
        optimisation=TYPES[dtype] | {"steps": 4, "micro_batch": 2},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("holdings")
    cases = [
        {
            "directory": str(directory / "-".join(case)),
            "spec": make(directory, *case).model_dump(mode="json"),
            "steps": 1,
        }
        for case in CASES
    ]
    run_group(directory, 2, cases)
    return directory


@pytest.mark.parametrize(("method", "engine", "dtype"), CASES)
def test_a_rank_holds_what_the_calculator_says(trained: Path, method: str, engine: str, dtype: str) -> None:
    """Shards are padded, to a multiple of the ranks and of an alignment: up to 2 % of so small a model."""
    live = read_json(trained / f"{method}-{engine}-{dtype}" / "answer.json")["live"]
    wanted = make(trained, method, engine, dtype)
    assert combination_problem(wanted.method, wanted.optimisation, wanted.deepspeed) is None
    found = memory(
        wanted.method,
        model_of(PRESETS["llama-tiny"], vocabulary=257),
        dtype=wanted.optimisation.dtype,
        merge=wanted.optimisation.merge,
        zero_stage=wanted.deepspeed.zero_stage,
        offload=wanted.deepspeed.offload,
        offload_parameters=wanted.deepspeed.offload_parameters,
        processes=2,
    )
    states = found.host if wanted.deepspeed.offload != "none" else found.device
    parameters = found.host if wanted.deepspeed.offload_parameters != "none" else found.device
    assert live["parameters"] == pytest.approx(parameters.weights + parameters.basis, rel=0.02)
    assert live["buffers"] == found.device.buffers
    assert live["masters"] == pytest.approx(states.masters, rel=0.02)
    assert live["moments"] == pytest.approx(states.moments, rel=0.02)
