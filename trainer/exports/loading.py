"""A directory of factors as a model that generates."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
)

from trainer.classify.model import is_classifier
from trainer.errors import CheckpointError
from trainer.exports.factored import FACTORS, FORMAT, STEM
from trainer.lowrank.adapted import Adapted, replace_targets
from trainer.lowrank.factored import FactoredLinear
from trainer.model import empty_model, in_order
from trainer.weights import Filler, Stored


def load_factored(path: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The PreTrainedModel of an export with --format factored, on the CPU, ready for `generate` or `to`.

    `dtype` is by default what the directory states. The factors stay factors: a target computes x Aᵀ Bᵀ, and no matrix
    of its size is ever made. Raises CheckpointError where the directory is not such an export, or not whole.
    """
    path = Path(path)
    try:
        facts = json.loads((path / FACTORS).read_text())
        known = facts["format"] == FORMAT
        rank, scale, targets = facts["rank"], facts["scale"], tuple(facts["targets"])
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no export with --format factored: {error!r}") from error
    if not known:
        raise CheckpointError(f"{path / FACTORS} has format {facts['format']}, this version reads {FORMAT}")

    model = empty_factored(config, dtype or config.dtype or torch.float32, rank, scale, targets)
    stored = Stored(path, STEM)
    if not stored.has_all_of(model):
        raise CheckpointError(f"{path}: {STEM}*.safetensors lack tensors of this model; export the run again")
    filler = Filler(model, stored)
    for module in in_order(model):
        filler.fill(module)
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def empty_factored(
    config: PretrainedConfig, dtype: torch.dtype, rank: int, scale: float, targets: tuple[str, ...]
) -> Any:
    """The model with factors, B (m, r) and A (r, n), in the place of its targets, and no values yet."""

    def make(linear: nn.Linear, name: str, index: int) -> Adapted:
        b, a = linear.weight.new_empty(linear.out_features, rank), linear.weight.new_empty(rank, linear.in_features)
        return FactoredLinear(linear, name, b, a, scale, keep_weight=False)

    model = empty_model(
        config, dtype, AutoModelForSequenceClassification if is_classifier(config) else AutoModelForCausalLM
    )
    replace_targets(model, targets, make, rank)
    return model
