"""Settings that would not do what their names say are refused with the field, the value and the remedy."""

from typing import Any

import pytest
from pydantic import ValidationError

from trainer.config import TrainingSpec, problems
from trainer.methodconfig import METHOD_CONFIGS

PRETRAINED = {"path": "/a/model"}


def refusal(method: Any, model: Any = "llama-tiny", **optimisation: Any) -> tuple[str, str]:
    body = {
        "model": model,
        "dataset": "python-stdlib",
        "method": method,
        "optimisation": {"steps": 1000, "global_batch": 4} | optimisation,
        "deepspeed": {"zero_stage": 1},
    }
    with pytest.raises(ValidationError) as refused:
        TrainingSpec.model_validate(body)
    (problem,) = problems(refused.value)
    return problem


@pytest.mark.parametrize("name", ["lowrank", "sltrain"])
def test_methods_without_a_place_for_pretrained_weights_do_not_drop_them(name: str) -> None:
    field, message = refusal(name, PRETRAINED)
    assert field == "model.weights"
    assert "would drop them" in message


def test_loro_does_not_decay_a_pretrained_weight_towards_noise() -> None:
    field, message = refusal({"name": "loro"}, PRETRAINED, weight_decay=0.1)
    assert field == "optimisation.weight_decay"
    assert "0.1" in message and "set it to 0" in message


def test_large_switches_in_bf16_need_a_stage_that_adds_up_in_fp32() -> None:
    field, message = refusal({"name": "galore", "switch_batches": 8}, dtype="bf16")
    assert field == "method.switch_batches"
    assert "zero_stage 2" in message


def test_golore_is_refused_just_when_no_switch_is_random() -> None:
    assert refusal({"name": "golore", "period": 500})[0] == "method.random_fraction"
    for random in ({"period": 850}, {"random_fraction": 0.0}, {"period": 200}):
        body = {"model": "llama-tiny", "dataset": "python-stdlib", "method": {"name": "golore"} | random}
        TrainingSpec.model_validate(body | {"optimisation": {"steps": 1000}})


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_a_resolved_spec_is_itself_accepted_and_the_same(name: str) -> None:
    body = {"model": "llama-130m", "dataset": "python-stdlib", "method": name, "optimisation": {"steps": 2000}}
    spec = TrainingSpec.model_validate(body)
    assert TrainingSpec.model_validate(spec.model_dump()) == spec
    assert TrainingSpec.model_validate_json(spec.model_dump_json()) == spec
    assert getattr(spec.method, "rank", 256) == 256


def test_defaults_by_model_size_are_the_papers() -> None:
    def resolved(preset: str) -> tuple[int, float, int]:
        body = {"model": preset, "dataset": "python-stdlib", "method": "loro", "optimisation": {"steps": 1000}}
        spec = TrainingSpec.model_validate(body)
        method: Any = spec.method
        return method.period, spec.optimisation.learning_rate or 0.0, method.rank

    assert resolved("llama-60m") == (500, 1e-2, 128)
    assert resolved("llama-130m") == (500, 1e-2, 256)
    assert resolved("llama-350m") == (500, 1e-2, 256)
    assert resolved("llama-1b") == (200, 5e-3, 512)
    assert resolved("llama-7b") == (200, 5e-3, 1024)


def test_large_switches_read_more_and_the_next_step_goes_on_behind_them() -> None:
    body = {
        "model": "llama-tiny",
        "dataset": "python-stdlib",
        "method": {"name": "golore", "rank": 4, "period": 3, "switch_batches": 5, "random_fraction": 0.5},
        "optimisation": {"steps": 12},
    }
    spec = TrainingSpec.model_validate(body)
    # Switches at 0, 3 (large), 6, 9 (random, and so not).
    assert [spec.batches_before(step) for step in (0, 1, 2, 3, 4, 6, 7, 12)] == [0, 5, 6, 7, 12, 14, 15, 20]
