"""A classifier's configuration, and which part of its head is new.

The head (`trainer.heads`) comes with the weights where they are a classifier's of the same labels; else what lies
outside the base model is drawn from the seed, as is whatever else of the head the weights lack (a pooler that only the
base of another task has none of). Nothing but the head may be missing from pretrained weights.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer import access
from trainer.classify.labels import dataset_of
from trainer.classify.make import set_padding
from trainer.config import TrainingSpec
from trainer.errors import SpecError
from trainer.heads import head_parameters
from trainer.weights import Drawn

_KIND = "ForSequenceClassification"


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether the weights beside the configuration are a sequence classifier's."""
    return any(name.endswith(_KIND) for name in config.architectures or ())


def has_labels_of(config: PretrainedConfig, spec: TrainingSpec) -> bool:
    """Whether they tell the run's own classes apart: of the same names, or as many without names."""
    if not is_classifier(config):
        return False
    labels = _names(spec)
    named: dict[Any, Any] = config.id2label or {}
    theirs = tuple(str(named[place]) for place in sorted(named))
    return theirs == labels or (len(theirs) == len(labels) and theirs == _nameless(len(labels)))


def set_labels(config: PretrainedConfig, spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the configuration that of the run's classifier."""
    names = _names(spec)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: place for place, name in enumerate(names)}
    config.problem_type = "regression" if dataset_of(spec).kind == "number" else "single_label_classification"
    if config.pad_token_id is None or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        # By it a decoder finds an example's last token, so it is what the exported tokeniser pads with, whatever its
        # configuration states (LLaMA's -1, or 0). Encoders may count positions by theirs.
        set_padding(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id


def _names(spec: TrainingSpec) -> tuple[str, ...]:
    if dataset_of(spec).kind == "number":
        return _nameless(1)
    labels = dataset_of(spec).labels
    assert labels is not None, "completed once the data was made"
    return labels


def _nameless(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{place}" for place in range(count))


def new_names(model: Any, lacking: set[str], same_labels: bool) -> set[str]:
    """Parameters that are drawn, of a model whose weights lack those. Raises SpecError where more than a head lacks."""
    head = head_parameters(model)
    if beyond := sorted(lacking - set(head)):
        raise SpecError(
            f"model: its weights lack {beyond[0]} and {len(beyond) - 1} more of what {type(model).__name__} has beside "
            "its head; choose the weights of this architecture, or weights: random"
        )
    base = {id(parameter) for parameter in model.base_model.parameters()}
    outside = {name for name, parameter in head.items() if id(parameter) not in base}
    return lacking | (outside if not same_labels or lacking & outside else set())


def loaded(name: str, revision: dict[str, str], config: Any, dtype: torch.dtype, same_labels: bool, seed: int) -> Any:
    """By transformers' own loader, which knows of names and shapes that change on the way."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name,
        **revision,
        **access.remote_code(),
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        # Safetensors alone: the other formats are pickles, and a pickle is a program.
        use_safetensors=True,
        dtype=dtype,
    )
    lacking = set(info["missing_keys"]) | {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    draw(model, new_names(model, lacking & set(dict(model.named_parameters())), same_labels), seed)
    return model


def draw(model: Any, names: set[str], seed: int) -> None:
    """Give parameters new values, functions of the seed and their names."""
    source = Drawn(model, seed)
    by_module: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        module, _, key = name.rpartition(".")
        by_module.setdefault(module, {})[key] = name
    for owner, keys in by_module.items():
        part: nn.Module = model.get_submodule(owner)
        for key, value in source.values(part, keys).items():
            parameter = part.get_parameter(key)
            parameter.data.copy_(value.to(parameter.dtype))
