"""LoRA and DoRA as an adapter that `peft.PeftModel.from_pretrained(base, OUT)` loads, with the run's own logits.

What our LoRA and DoRA train beside their factors (a classifier's head; where the others are trained, embeddings, norms,
head and biases) has to be somewhere:

- A run that started from pretrained weights leaves those where they are: its base is the directory or the hub's model
  that it started from. What was trained of it whole is in the adapter, as peft's `modules_to_save`, and the biases of
  the targets as its `bias: lora_only`. A bf16 run has trained beside a base in bf16: load it as such.
- A run that started from random values has a base that nobody else has. It is written to OUT/base, the frozen W of the
  targets and all else as trained; the adapter is nothing but the factors. peft finds the base by its full path, so
  whoever moves OUT names the base anew. So it is with a run that started from another run's export, which need not
  last.

The adapter is one file, as peft wants it: unlike the merged model it is in memory whole.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from trainer.errors import SpecError
from trainer.exports.destination import Destination
from trainer.exports.merged import write_model
from trainer.exports.trained import Trained
from trainer.heads import head_modules, head_parameters
from trainer.methodconfig import DoraConfig, LoraConfig
from trainer.modelconfig import DirectoryModel, HubModel, starts_from_weights

_PREFIX = "base_model.model."
# peft's name for each of a layer's own parameters.
_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def write_adapter(trained: Trained, destination: Destination) -> None:
    """Raises SpecError for other methods."""
    method = trained.spec.method
    if not isinstance(method, LoraConfig | DoraConfig):
        raise SpecError(
            f"--format: {method.name} is no adapter in peft's sense, only lora and dora are; choose --format merged"
        )
    assert method.rank is not None
    tensors = {
        f"{_PREFIX}{name}.{theirs}": trained.stored.get(f"{name}.{ours}")
        for name, layer in trained.layers.items()
        for ours, theirs in _NAMES.items()
        if hasattr(layer, ours)
    }
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if trained.spec.task == "classify" else "CAUSAL_LM",
        "inference_mode": True,
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": 0.0,
        "use_dora": method.name == "dora",
        "target_modules": trained.targets,
        "bias": "none",
        "modules_to_save": None,
    }
    if starts_from_weights(trained.spec.model) and not trained.from_export:
        config |= _place_of_base(trained) | _modules_to_save(trained)
        tensors |= _trained_whole(trained)
    else:
        base = destination.directory / "base"
        base.mkdir()
        write_model(trained, trained.stored.get, replace(destination, directory=base))
        trained.tokenizer.save_pretrained(base)
        if trained.spec.task == "classify":
            # From the base, where it is as trained; peft keeps a classifier's head of its own in any case.
            tensors |= {_PREFIX + key: trained.stored.get(key) for key in head_parameters(trained.model)}
            config |= {"modules_to_save": head_modules(trained.model)}
        config |= {"base_model_name_or_path": str((destination.out / "base").resolve())}
    (destination.directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    typed = {key: destination.typed(tensor).contiguous() for key, tensor in tensors.items()}
    save_file(typed, destination.directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _place_of_base(trained: Trained) -> dict[str, Any]:
    model = trained.spec.model
    if isinstance(model, HubModel):
        return {"base_model_name_or_path": model.hub, "revision": model.revision}
    assert isinstance(model, DirectoryModel)
    return {"base_model_name_or_path": str(Path(model.path).resolve())}


def _modules_to_save(trained: Trained) -> dict[str, Any]:
    """What of the model peft shall keep whole. A head goes by its outermost modules, as peft has it of a classifier."""
    heads = head_modules(trained.model) if trained.spec.task == "classify" else []
    parents = dict.fromkeys(key.rpartition(".")[0] for key in trained.plain if trained.is_trained(key))
    whole = [name for name in parents if name not in trained.layers and not _is_within(name, heads)]
    biases = any(f"{name}.bias" in trained.plain and trained.is_trained(f"{name}.bias") for name in trained.layers)
    return {
        "modules_to_save": [*whole, *heads] or None,
        "bias": "lora_only" if biases else "none",
        "ensure_weight_tying": any(trained.is_trained(key) for key in trained.aliases.values()),
    }


def _is_within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _trained_whole(trained: Trained) -> dict[str, Tensor]:
    found = {}
    for key in trained.plain:
        name, _, leaf = key.rpartition(".")
        if not trained.is_trained(key):
            continue
        if name not in trained.layers:
            found[_PREFIX + key] = trained.stored.get(key)
        elif leaf == "bias":
            found[f"{_PREFIX}{name}.base_layer.bias"] = trained.stored.get(key)
    # peft asks for a tied tensor under each of its names, and safetensors stores no tensor under two.
    aliases = {alias: key for alias, key in trained.aliases.items() if trained.is_trained(key)}
    return found | {_PREFIX + alias: trained.stored.get(key).clone() for alias, key in aliases.items()}
