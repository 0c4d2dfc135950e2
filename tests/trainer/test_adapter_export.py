"""LoRA and DoRA exported for peft, and loaded by it: the run's own logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.trainer.finished import finished, logits_of
from tests.trainer.test_models import qwen_with_biases, tied_grouped_llama
from trainer.errors import SpecError
from trainer.exporting import keep_configuration
from trainer.exports.export import export

pytestmark = pytest.mark.usefixtures("process_group")


def config_of(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "adapter_config.json").read_text())
    return config


@pytest.mark.parametrize("make", [tied_grouped_llama, qwen_with_biases])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_beside_the_pretrained_base_it_has_the_run_s_logits(tmp_path: Path, name: str, make: Any) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    changes = {"model": {"path": str(tmp_path / "model")}, "tokenizer": "bytes"}
    run, rundir, _ = finished(tmp_path, method={"name": name, "rank": 4, "alpha": 6.0}, **changes)
    out = tmp_path / "out"
    export(rundir, out, form="peft")
    assert config_of(out)["base_model_name_or_path"] == str(tmp_path / "model")
    assert not (out / "base").exists()
    expected = logits_of(run.model, run)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (logits_of(base, run) - expected).abs().max() > 0.1
    adapted = PeftModel.from_pretrained(base, out)
    assert (logits_of(adapted, run) - expected).abs().max() < 1e-5
    merged = adapted.merge_and_unload()
    assert (logits_of(merged, run) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_of_a_run_from_random_values_it_brings_its_base(tmp_path: Path, name: str) -> None:
    run, rundir, _ = finished(tmp_path, method={"name": name, "rank": 4})
    out = tmp_path / "out"
    export(rundir, out, form="peft", shard_size="200KB")
    assert config_of(out)["base_model_name_or_path"] == str(out / "base")
    assert len(list((out / "base").glob("model-*.safetensors"))) > 2
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        assert all(".lora_" in key for key in file.keys())  # noqa: SIM118
    expected = logits_of(run.model, run)
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    assert (logits_of(base, run) - expected).abs().max() > 0.01
    assert (logits_of(AutoPeftModelForCausalLM.from_pretrained(out), run) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("make", [tied_grouped_llama, qwen_with_biases])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_of_a_run_from_an_export_that_is_gone_it_brings_its_base(tmp_path: Path, name: str, make: Any) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    changes = {"model": {"path": str(tmp_path / "model")}, "tokenizer": "bytes"}
    run, rundir, _ = finished(tmp_path, method={"name": name, "rank": 4, "alpha": 6.0}, **changes)
    keep_configuration(tmp_path / "model", rundir)
    shutil.rmtree(tmp_path / "model")
    for form in ("merged", "peft"):
        export(rundir, tmp_path / form, form=form)
    expected = logits_of(run.model, run)
    assert config_of(tmp_path / "peft")["base_model_name_or_path"] == str(tmp_path / "peft" / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits_of(merged, run) - expected).abs().max() < 1e-5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base")
    assert (logits_of(base, run) - expected).abs().max() > 0.1
    assert (logits_of(PeftModel.from_pretrained(base, tmp_path / "peft"), run) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["full", "lowrank", "sltrain"])
def test_a_method_that_is_no_adapter_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    _, rundir, _ = finished(tmp_path, steps=1, method={"name": name} | ({} if name == "full" else {"rank": 4}))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SpecError, match=f"--format: {name} is no adapter in peft's sense, only lora and dora are"):
        export(rundir, tmp_path / "out", form="peft")
    assert sorted(tmp_path.iterdir()) == before
