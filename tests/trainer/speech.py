"""Tiny models in directories, for what speaks: a LLaMA over bytes with random weights, and a chat template."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer.tokenizer import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ raise_exception('no ' + m['role']) if m['role'] == 'tool' }}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def speaking_model(directory: Path, seed: int = 0, context: int = 256, template: str | None = TEMPLATE) -> Path:
    """Its weights are large, so that one token is clearly the likeliest, and what it says is not all the same."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context,
        eos_token_id=256,
        bos_token_id=None,
        initializer_range=0.5,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        # Printable ones, and hardly ever the end.
        model.lm_head.weight[128:] *= 0.2
        model.lm_head.weight[:32] *= 0.2
    # What its makers found best must not decide where a request says nothing.
    model.generation_config.update(temperature=0.3, top_k=1, do_sample=True)
    model.save_pretrained(directory)
    tokenizer: PreTrainedTokenizerBase = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory
