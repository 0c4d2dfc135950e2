"""LoRA and DoRA beside another package's: Hugging Face's PEFT, with torch's AdamW, from the same start in float64."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from tests.reference.decoder import decoder
from tests.reference.product import product_run, start_of
from tests.trainer.test_exact import batches_of, spec_for
from trainer.methods import make_method
from trainer.presets import LLAMA_TARGETS
from trainer.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_an_adapter_trains_as_in_peft(tmp_path: Path, name: str) -> None:
    spec, model = spec_for(tmp_path, name, weight_decay=0.0), decoder()
    batches = batches_of(spec)
    ours, losses, _, _ = product_run(spec, model, batches)

    method = make_method(spec)
    method.attach(copy.deepcopy(model))
    config = LoraConfig(r=6, lora_alpha=32, target_modules=list(LLAMA_TARGETS), use_dora=name == "dora")
    theirs = inject_adapter_in_model(config, copy.deepcopy(model)).double()
    adapters = {path: module for path, module in theirs.named_modules() if isinstance(module, LoraLayer)}
    for layer in method.layers:
        adapters[layer.name].lora_A["default"].weight.data.copy_(start_of(layer)["A"])
    for parameter_name, parameter in theirs.named_parameters():
        parameter.requires_grad_(not parameter_name.endswith("base_layer.weight"))

    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], eps=1e-5, weight_decay=0.0)
    for step, micro_batches in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(step + 1, spec.optimisation)
        optimizer.zero_grad()
        tokens = torch.cat(micro_batches)
        loss = theirs(input_ids=tokens, labels=tokens).loss
        assert loss.item() == pytest.approx(losses[step], abs=1e-10)
        loss.backward()
        optimizer.step()
    for path, adapter in adapters.items():
        adapter.merge()
        assert (adapter.base_layer.weight - ours[f"{path}.weight"]).abs().max() < 1e-10, path
