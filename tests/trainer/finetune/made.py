"""Small models, tokenisers and files of examples, made by the tests themselves."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from trainer import events
from trainer.config import TrainingSpec
from trainer.prepare import prepare
from trainer.run import Run
from trainer.rundir import RunDir

# In the manner of ChatML. Marks what is learnt itself.
MARKED = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{%- generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{%- else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)
UNMARKED = MARKED.replace("{%- generation %}", "").replace("{% endgeneration %}", "")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    # Windows shorter than an example, and no sdpa.
    "gemma2": (Gemma2Config, SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8,
                                      "sliding_window": 16}),
    "neox": (GPTNeoXConfig, SMALL | {"intermediate_size": 48}),
    "opt": (OPTConfig, SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                          "attn_pdrop": 0.0}),
}  # fmt: skip
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


def sums(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations about sums, of one or two turns."""
    draw = random.Random(seed)

    def turn() -> list[dict[str, Any]]:
        a, b = draw.randrange(100), draw.randrange(100)
        words = "so it is " * draw.randrange(4)
        return [
            {"role": "user", "content": f"What is {a} plus {b}?"},
            {"role": "assistant", "content": f"{words}{a + b}."},
        ]

    system = [{"role": "system", "content": "You add numbers."}]
    return [{"messages": system * draw.randrange(2) + turn() + turn() * draw.randrange(2)} for _ in range(count)]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tokenizer(template: str | None = MARKED) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the sums."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    texts = [message["content"] for record in sums(200) for message in record["messages"]]
    special = ["<|im_start|>", "<|im_end|>"]
    bare.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def model(directory: Path, kind: str = "llama", template: str | None = MARKED, **sizes: Any) -> Path:
    """A Hugging Face directory with random weights and a tokeniser."""
    path = directory / f"model-{kind}"
    if not (path / "config.json").exists():
        config, usual = SIZES[kind]
        wanted = {"vocab_size": 330, "max_position_embeddings": 128, "initializer_range": 0.2}
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config(**(wanted | usual | sizes))).save_pretrained(path)
        tokenizer(template).save_pretrained(path)
    return path


def spec(directory: Path, kind: str = "llama", **changes: Any) -> TrainingSpec:
    """A small fine-tuning; `changes` are merged one level deep, but for a named method."""
    path = directory / "sums.jsonl"
    if not path.exists():
        write(path, sums(24))
    base: dict[str, Any] = {
        "task": "finetune",
        "model": {"path": str(model(directory, kind))},
        "dataset": {
            "source": "examples",
            "files": [str(path)],
            "sequence_length": 96,
            "validation_fraction": 0.2,
            "samples": 0,
        },
        "method": {"name": "full"},
        "optimisation": {"steps": 4, "global_batch": 8, "learning_rate": 0.01, "warmup_steps": 1, "epsilon": 1e-5},
        "deepspeed": {"zero_stage": 2},
        "resources": {"processes": 1},
    }
    for key, value in changes.items():
        merged = isinstance(base.get(key), dict) and isinstance(value, dict) and "name" not in value
        base[key] = base[key] | value if merged else value
    return TrainingSpec.model_validate(base)


def make(wanted: TrainingSpec, rundir: RunDir) -> list[events.Event]:
    """Prepare the run directory; what was told."""
    told: list[events.Event] = []
    assert prepare(wanted, rundir, 0, told.append, lambda: False)
    return told


def run(directory: Path, name: str = "run", kind: str = "llama", **changes: Any) -> tuple[Run, list[events.Event]]:
    """Use the fixture `process_group`."""
    wanted, rundir = spec(directory, kind, **changes), RunDir(directory / name)
    told = make(wanted, rundir)
    rundir.spec.write_text(wanted.model_dump_json())
    return Run(wanted, rundir, told.append), told
