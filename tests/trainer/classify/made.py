"""Small classifiers' bases, a tokeniser, and labelled sentences that can be learnt, made by the tests themselves."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from trainer import events
from trainer.config import TrainingSpec
from trainer.prepare import prepare
from trainer.run import Run
from trainer.rundir import RunDir

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
GOOD, BAD = ["good", "fine", "lovely"], ["bad", "poor", "awful"]
PLAIN = [
    "the",
    "a",
    "film",
    "play",
    "book",
    "was",
    "is",
    "and",
    "very",
    "rather",
    "it",
    "they",
    "we",
    "not",
    "of",
    "in",
    "to",
]
WORDS = [*SPECIAL, *GOOD, *BAD, *PLAIN]

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "type_vocab_size": 0}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "seq_classif_dropout": 0.0}
SIZES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "roberta": (RobertaConfig, SMALL | NO_DROPOUT | {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "bert": (BertConfig, SMALL | NO_DROPOUT),
    "deberta": (DebertaV2Config, SMALL | NO_DROPOUT | DEBERTA),
    "distilbert": (DistilBertConfig, DISTIL),
    "llama": (LlamaConfig, SMALL | {"num_key_value_heads": 2}),
}


def sentences(count: int, seed: int = 0, pairs: bool = False) -> list[dict[str, Any]]:
    """pos or neg, by their one telling word; in a pair, by whether both are alike. `score`: how many words are good."""
    draw = random.Random(seed)

    def sentence(label: int) -> str:
        words = [draw.choice(PLAIN) for _ in range(draw.randrange(2, 9))]
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if label else BAD))
        return " ".join(words)

    found = []
    for _ in range(count):
        label, other = draw.randrange(3) > 0, draw.randrange(2)
        more = {"pair": sentence(other)} if pairs else {}
        right = (label == other) if pairs else label
        found.append({"text": sentence(label), **more, "label": "pos" if right else "neg", "score": 4.0 * label + 0.5})
    return found


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def tokenizer(kind: str = "roberta") -> PreTrainedTokenizerFast:
    """A word a token. Pairs as RoBERTa has them, or as BERT, or (llama) one behind the other, without padding."""
    bare = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = {"roberta": "<s> $A </s> </s> $B </s>", "llama": "<s> $A $B"}.get(kind, "<s>:0 $A:0 </s>:0 $B:1 </s>:1")
    single = "<s> $A" if kind == "llama" else "<s> $A </s>"
    special = [(token, WORDS.index(token)) for token in ("<s>", "</s>")]
    bare.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    padding: dict[str, Any] = {} if kind == "llama" else {"pad_token": "<pad>"}
    if kind in ("bert", "deberta"):
        padding["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>", cls_token="<s>", sep_token="</s>",
        **padding,
    )  # fmt: skip


def base(directory: Path, kind: str = "roberta", **sizes: Any) -> Path:
    """A pretrained base, as it is published: with the head of another task."""
    path = directory / f"base-{kind}"
    if not (path / "config.json").exists():
        config, usual = SIZES[kind]
        wanted = {"vocab_size": len(WORDS), "pad_token_id": None if kind == "llama" else 1, "initializer_range": 0.2}
        auto: Any = AutoModelForCausalLM if kind == "llama" else AutoModelForMaskedLM
        torch.manual_seed(0)
        auto.from_config(config(**(wanted | usual | sizes))).save_pretrained(path)
        tokenizer(kind).save_pretrained(path)
    return path


def spec(directory: Path, kind: str = "roberta", **changes: Any) -> TrainingSpec:
    """A small classification; `changes` are merged one level deep, but for a named method."""
    path = directory / "sentences.jsonl"
    if not path.exists():
        write(path, sentences(60))
    wanted: dict[str, Any] = {
        "task": "classify",
        "model": {"path": str(base(directory, kind))},
        "dataset": {
            "source": "labelled",
            "files": [str(path)],
            "labels": ["neg", "pos"],
            "sequence_length": 24,
            "validation_fraction": 0.25,
        },
        "method": {"name": "full"},
        "optimisation": {"steps": 4, "global_batch": 8, "learning_rate": 2e-3, "warmup_steps": 1, "epsilon": 1e-6},
        "deepspeed": {"zero_stage": 2},
        "resources": {"processes": 1},
    }
    for key, value in changes.items():
        both = isinstance(wanted.get(key), dict) and isinstance(value, dict)
        other = key == "model" or (key == "method" and "name" in value)
        wanted[key] = wanted[key] | value if both and not other else value
    return TrainingSpec.model_validate(wanted)


def make_run(directory: Path, kind: str = "roberta", **changes: Any) -> tuple[Run, list[events.Event]]:
    found: list[events.Event] = []
    rundir = RunDir(directory / "run")
    wanted = spec(directory, kind, **changes)
    prepare(wanted, rundir, 0, found.append, lambda: False)
    return Run(wanted, rundir, found.append), found


def finished(directory: Path, kind: str = "roberta", **changes: Any) -> tuple[Run, RunDir, list[events.Evaluated]]:
    """(the run, its directory as the command wants it, evaluations before the first and after the last step)."""
    run, found = make_run(directory, kind, **changes)
    run.evaluate()
    while run.step < (run.spec.optimisation.steps or 0):
        run.train_step(lambda: False)
    run.save(run.evaluate())
    run.rundir.spec.write_text(spec(directory, kind, **changes).model_dump_json())
    return run, run.rundir, [event for event in found if isinstance(event, events.Evaluated)]
