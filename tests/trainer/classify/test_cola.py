"""A real data set: CoLA (Warstadt et al. 2019), where it is at hand. It is looked for in STIEFEL_TEST_DATA.

Whether a sentence is acceptable English cannot be learnt from scratch in seconds: a small model is judged on the
sentences that it was shown. On those that are held out a pretrained encoder is judged, where there is one: three epochs
of its LoRA are ten minutes of a core. `python -m benchmarks.cola` has the figures of both (docs/fine-tuning.md).
"""

import csv
from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score, matthews_corrcoef
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from tests.datasets import COLA, COLA_HELD_OUT, ENCODER
from tests.trainer.classify import made
from trainer.events import Evaluated
from trainer.exports.export import export

pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.skipif(not COLA.exists(), reason=f"there is no {COLA}"),
]
EXAMPLES = 128


def read(path: Path, most: int | None = None) -> tuple[list[list[str]], list[str], list[int]]:
    """The first rows of a file of CoLA, their sentences, and their labels."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:most]
    return rows, [row[3] for row in rows], [int(row[1]) for row in rows]


def shown(directory: Path) -> tuple[Path, list[str], list[int]]:
    """The first so many sentences as a file of the same form, the sentences, and their labels."""
    rows, sentences, labels = read(COLA, EXAMPLES)
    path = directory / "cola.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path, sentences, labels


def base(directory: Path, sentences: list[str]) -> Path:
    """A small RoBERTa as it is published, with a tokeniser that was trained on the sentences."""
    bare = Tokenizer(models.BPE(unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=600, special_tokens=made.SPECIAL))
    special = [(token, bare.token_to_id(token)) for token in ("<s>", "</s>")]
    bare.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>",
    )  # fmt: skip
    tokenizer.save_pretrained(directory / "base")
    torch.manual_seed(0)
    sizes = made.SMALL | made.NO_DROPOUT | {"hidden_size": 64, "max_position_embeddings": 66, "type_vocab_size": 1}
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=1, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(directory / "base")
    return directory / "base"


@pytest.mark.parametrize("method", ["full", "galore", "lora"])
def test_what_was_shown_is_told_apart_better_than_by_the_majority_and_so_by_the_export(
    tmp_path: Path, method: str
) -> None:
    file, sentences, labels = shown(tmp_path)
    settings = {"full": {}, "galore": {"rank": 16, "period": 50, "alpha": 1.0}, "lora": {"rank": 16}}[method]
    run, rundir, (before, *_, after) = made.finished(
        tmp_path,
        model={"path": str(base(tmp_path, sentences))},
        dataset={
            "source": "labelled",
            "glue": "cola",
            "files": [str(file)],
            "validation_files": [str(file)],
            "sequence_length": 48,
            "labels": None,
            "validation_fraction": 0.0,
        },
        method={"name": method} | settings,
        optimisation={"steps": 120, "global_batch": 32, "learning_rate": 3e-3, "others": "trained"},
    )
    assert after.loss < 0.8 * before.loss
    assert after.accuracy is not None and after.accuracy > majority(labels) + 0.05
    export(rundir, tmp_path / "out")
    assert_reloads(tmp_path / "out", sentences, labels, after)


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not (ENCODER.exists() and COLA_HELD_OUT.exists()), reason=f"there is no {ENCODER}")
def test_a_pretrained_encoder_tells_held_out_sentences_apart_better_than_the_majority(tmp_path: Path) -> None:
    """By what is the default for CoLA with LoRA, after the last step: nothing is chosen by what is held out."""
    _, sentences, labels = read(COLA_HELD_OUT)
    run, rundir, (before, *_, after) = made.finished(
        tmp_path,
        model={"path": str(ENCODER)},
        dataset={
            "source": "labelled",
            "glue": "cola",
            "files": [str(COLA)],
            "validation_files": [str(COLA_HELD_OUT)],
            "sequence_length": 64,
            "labels": None,
            "validation_fraction": 0.0,
        },
        method={"name": "lora"},
        optimisation={
            "steps": 804, "global_batch": 32, "learning_rate": None, "warmup_steps": None, "epsilon": 1e-8,
        },
    )  # fmt: skip
    assert run.spec.optimisation.learning_rate == 4e-4
    assert after.loss < 0.9 * before.loss
    assert after.accuracy is not None and after.accuracy > majority(labels)
    assert after.metrics["matthews"] > 0.15
    export(rundir, tmp_path / "out")
    assert_reloads(tmp_path / "out", sentences, labels, after)


def majority(labels: list[int]) -> float:
    return max(sum(labels), len(labels) - sum(labels)) / len(labels)


def assert_reloads(directory: Path, sentences: list[str], labels: list[int], told: Evaluated) -> None:
    """To the same figures, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokens = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        guesses = model(**tokens(sentences, padding=True, return_tensors="pt")).logits.argmax(-1)
    assert accuracy_score(labels, guesses) == pytest.approx(told.accuracy)
    assert matthews_corrcoef(labels, guesses) == pytest.approx(told.metrics["matthews"])
