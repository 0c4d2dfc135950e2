"""What DeepSpeed is told, and what is refused before it is asked."""

from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from tests.trainer.alone import alone, make_run
from trainer import engine
from trainer.config import TrainingSpec, problems


def test_deepspeed_takes_the_settings_of_nvme_as_they_are_meant(tmp_path: Path) -> None:
    spec = alone(
        tmp_path,
        deepspeed={
            "zero_stage": 3,
            "offload": "nvme",
            "offload_parameters": "nvme",
            "nvme_path": "/fast",
            "persistence_threshold": 7,
        },
    )
    parsed = DeepSpeedZeroConfig(**engine.configuration(spec)["zero_optimization"])
    assert parsed.stage == 3
    assert parsed.param_persistence_threshold == 7
    for part in (parsed.offload_optimizer, parsed.offload_param):
        assert part is not None
        assert (part.device, str(part.nvme_path)) == ("nvme", "/fast")


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("method", ["full", "galore"])
def test_the_bucket_of_gradients_is_no_larger_than_what_is_trained(tmp_path: Path, method: str) -> None:
    run, _ = make_run(tmp_path, method=method, deepspeed={"zero_stage": 3, "persistence_threshold": 0})
    trained = sum(p.ds_numel for p in run.model.parameters() if p.requires_grad)
    assert run.engine.zero_reduce_bucket_size() == trained


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"deepspeed": {"zero_stage": 0, "offload": "cpu"}}, "deepspeed.offload"),
        ({"deepspeed": {"zero_stage": 2, "offload": "nvme", "nvme_path": "/fast"}}, "deepspeed.offload"),
        ({"deepspeed": {"zero_stage": 2, "offload_parameters": "cpu"}}, "deepspeed.offload_parameters"),
        ({"deepspeed": {"zero_stage": 3, "offload": "nvme"}}, "deepspeed.nvme_path"),
        (
            {
                "deepspeed": {
                    "zero_stage": 3,
                    "offload_parameters": "nvme",
                    "nvme_path": "/fast",
                    "persistence_threshold": 2**18,
                }
            },
            "deepspeed.persistence_threshold",
        ),
        (
            {
                "method": "gasare",
                "deepspeed": {"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": "/fast"},
            },
            "deepspeed.offload_parameters",
        ),
        ({"deepspeed": {"zero_stage": 0}, "optimisation": {"dtype": "bf16"}}, "deepspeed.zero_stage"),
        ({"optimisation": {"merge": "fp32"}}, "optimisation.merge"),
        ({"method": "full", "optimisation": {"dtype": "bf16", "merge": "stochastic"}}, "optimisation.merge"),
        ({"checkpoints": {"url": "bucket/path"}}, "checkpoints.url"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_field_when_it_is_submitted(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        alone(tmp_path, **changes)
    ((told, message),) = problems(refused.value)
    assert told == field
    assert any(remedy in message for remedy in ("use", "leave", "give", "write"))


def test_a_spec_survives_its_own_json(tmp_path: Path) -> None:
    spec = alone(tmp_path, deepspeed={"zero_stage": 3, "offload_parameters": "cpu"})
    assert TrainingSpec.model_validate_json(spec.model_dump_json()) == spec
