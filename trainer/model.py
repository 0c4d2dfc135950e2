"""The model of a spec: a preset, a Hugging Face directory, or the hub."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer.config import HubModel, PresetModel, TrainingSpec
from trainer.errors import SpecError, unloadable
from trainer.presets import PRESETS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model in the spec's dtype on the CPU, its random weights a function of the seed alone.

    Raises SpecError when the vocabulary is smaller than the tokeniser's or the sequences are longer than the model's.
    """
    dtype = DTYPES[spec.optimisation.dtype]
    torch.manual_seed(spec.optimisation.seed)
    if isinstance(spec.model, PresetModel):
        model = _random(_preset_config(spec, spec.model, tokenizer), dtype)
    else:
        source = spec.model.hub if isinstance(spec.model, HubModel) else spec.model.path
        revision = {"revision": spec.model.revision} if isinstance(spec.model, HubModel) else {}
        try:
            config = AutoConfig.from_pretrained(source, **revision)
            if spec.model.weights == "random":
                model = _random(config, dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    source, **revision, dtype=dtype, attn_implementation="sdpa"
                )
        except (OSError, ValueError) as error:
            raise unloadable("model", source, error) from error
    _check_sizes(model, spec, len(tokenizer))
    if spec.optimisation.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def _preset_config(spec: TrainingSpec, preset: PresetModel, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    shape = PRESETS[preset.preset]
    return LlamaConfig(
        vocab_size=preset.vocabulary or len(tokenizer),
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


def _random(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    # Drawn in fp32 and cast after, so that fp32 and bf16 runs start from the same weights.
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # transformers' own
        config, attn_implementation="sdpa", dtype=torch.float32
    )
    # Parameters only: a rotary table in bf16 would turn positions by whole radians.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _check_sizes(model: Any, spec: TrainingSpec, tokens: int) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokens:
        raise SpecError(f"model: {rows} embedding rows are too few for a tokeniser of {tokens}; choose another one")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and spec.dataset.sequence_length > longest:
        raise SpecError(f"dataset.sequence_length: {spec.dataset.sequence_length} is above the model's {longest}")
