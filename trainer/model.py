"""The model of a spec: a preset, a Hugging Face directory, or the hub. Its structure here, its values from weights.py.

A structure has its parameters on torch's meta device: it takes no memory, and whoever builds on it says when each
module gets its values. A model that cannot be filled module by module (see `fills_by_module`) comes whole.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer import access
from trainer.classify import model as classifier
from trainer.config import TrainingSpec
from trainer.errors import SpecError, unloadable
from trainer.heads import head_parameters
from trainer.modelconfig import HubModel, PresetModel, starts_from_weights
from trainer.preflight import check_context
from trainer.presets import PRESETS
from trainer.weights import Drawn, Filler, Mixed, Source, Stored, directory_of, without_values

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Fill = Callable[[nn.Module], None]


def build_model(spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model whole in this process, on the CPU: what training starts from, before a method changes it."""
    model, source = structure(spec, tokenizer)
    filler = Filler(model, source)
    for module in in_order(model):
        filler.fill(module)
    return model


def structure(spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase, values: bool = True) -> tuple[Any, Source]:
    """(model in the spec's dtype, where its first values come from; random ones are functions of the seed alone).

    Without `values` no parameter has any, and no weights are looked for: a checkpoint has them. Raises SpecError when
    the vocabulary is smaller than the tokeniser's or the sequences are longer than the model's.
    """
    dtype = DTYPES[spec.optimisation.dtype]
    name, revision = _where(spec)
    try:
        config = _config(name, revision) if name else _preset_config(spec, tokenizer)
        # Of a classifier's weights; afterwards the configuration has the run's own labels.
        same_labels = spec.task == "classify" and classifier.has_labels_of(config, spec)
        if spec.task == "classify":
            classifier.set_labels(config, spec, tokenizer)
        auto = AutoModelForSequenceClassification if spec.task == "classify" else AutoModelForCausalLM
        model = _on_meta(config, dtype, auto)
        drawn = Drawn(model, spec.optimisation.seed)
        source: Source = drawn
        stored = starts_from_weights(spec.model) and values

        def loaded() -> Any:
            if spec.task == "classify":
                return classifier.loaded(name, revision, config, dtype, same_labels, spec.optimisation.seed)
            return _loaded(name, revision, dtype)

        if fills_by_module(model):
            if stored:
                found = Stored(directory_of(name, revision))
                lacking = found.lacks(model)
                if not lacking:
                    source = found
                if spec.task == "classify" and lacking <= set(head_parameters(model)):
                    source = Mixed(found, drawn, classifier.new_names(model, lacking, same_labels))
                elif lacking:
                    # Names or shapes that transformers changes on the way, or no safetensors: its own loader knows.
                    model = loaded()
        elif values:
            torch.manual_seed(spec.optimisation.seed)
            model = loaded() if stored else _from_config(config, dtype, auto)
        else:
            model = empty_model(config, dtype, auto)
    except (OSError, ValueError) as error:
        raise unloadable("model", name, error) from error
    _check_sizes(model, spec, len(tokenizer))
    if spec.optimisation.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model, source


def empty_model(config: PretrainedConfig, dtype: torch.dtype, auto: Any = AutoModelForCausalLM) -> Any:
    """A model of which no parameter has a value; `trainer.weights.Filler` gives them. `auto`: of transformers' classes
    that choose an architecture by the configuration."""
    model = _on_meta(config, dtype, auto)
    if not fills_by_module(model):
        # Its buffers are known to nobody but the model itself, when it is made whole.
        model = _from_config(config, dtype, auto)
        without_values(model)
    return model


def in_order(model: nn.Module) -> list[nn.Module]:
    """The modules, each after its children."""
    return [module for child in model.children() for module in in_order(child)] + [model]


def fills_by_module(model: PreTrainedModel) -> bool:
    """Whether each module's values can be made knowing that module alone.

    So it is where transformers' general initialisation is not overridden, and no module but rotary embeddings, whose
    tables follow from the configuration, has buffers.
    """
    general = all(
        type(module)._init_weights is PreTrainedModel._init_weights
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    )
    return general and all(
        hasattr(module, "original_inv_freq") or not list(module.buffers(recurse=False)) for module in model.modules()
    )


def _where(spec: TrainingSpec) -> tuple[str, dict[str, str]]:
    """(directory or hub id, revision); no name for a preset."""
    if isinstance(spec.model, PresetModel):
        return "", {}
    if isinstance(spec.model, HubModel):
        return spec.model.hub, {"revision": spec.model.revision}
    return spec.model.path, {}


def _config(name: str, revision: dict[str, str]) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(name, **revision, **access.remote_code())
    return config


def _preset_config(spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    assert isinstance(spec.model, PresetModel)
    shape = PRESETS[spec.model.preset]
    return LlamaConfig(
        vocab_size=spec.model.vocabulary or len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        max_position_embeddings=max(2048, spec.dataset.sequence_length),
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, auto: Any) -> Any:
    with torch.device("meta"):
        return _from_config(config, dtype, auto)


def _from_config(config: PretrainedConfig, dtype: torch.dtype, auto: Any) -> Any:
    # Drawn in fp32 and cast after, so that fp32 and bf16 runs start from the same weights. Left to itself, transformers
    # takes torch's own attention (sdpa) where the model can do with it, else the model's.
    model: Any = auto.from_config(config, dtype=torch.float32, **access.remote_code())
    # Parameters only: a rotary table in bf16 would turn positions by whole radians.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _loaded(name: str, revision: dict[str, str], dtype: torch.dtype) -> Any:
    # Safetensors alone: the other formats are pickles, and a pickle is a program.
    found: Any = AutoModelForCausalLM.from_pretrained(
        name, **revision, **access.remote_code(), dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    model, info = found
    # transformers draws what is not there, and only warns: an output embedding, where the weights are a base's alone.
    if lacking := sorted(set(info["missing_keys"]) & {key for key, _ in model.named_parameters()}):
        raise SpecError(
            f"model: its weights lack {lacking[0]} and {len(lacking) - 1} more of what {type(model).__name__} has; "
            "choose the weights of this architecture, or weights: random"
        )
    return model


def _longest_input(model: Any) -> int | None:
    """Tokens; None where the model knows no limit."""
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding's own.
        if longest and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest = min(longest, module.num_embeddings - module.padding_idx - 1)
    return longest


def _check_sizes(model: Any, spec: TrainingSpec, tokens: int) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokens:
        raise SpecError(f"model: {rows} embedding rows are too few for a tokeniser of {tokens}; choose another one")
    check_context(spec, _longest_input(model))
