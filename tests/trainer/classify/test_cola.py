"""A real data set: CoLA (Warstadt et al. 2019), where it is at hand. It is looked for in STIEFEL_TEST_DATA.

Whether a sentence is acceptable English cannot be learnt from scratch in seconds: what is judged here is a small model
on the sentences that it was shown. `python -m benchmarks.cola` has figures of sentences that were held out.
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

from tests.datasets import COLA
from tests.trainer.classify import made
from trainer.exports.export import export

pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.skipif(not COLA.exists(), reason=f"there is no {COLA}"),
]
EXAMPLES = 128


def shown(directory: Path) -> tuple[Path, list[str], list[int]]:
    """The first so many sentences as a file of the same form, the sentences, and their labels."""
    with COLA.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:EXAMPLES]
    path = directory / "cola.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path, [row[3] for row in rows], [int(row[1]) for row in rows]


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
    majority = max(sum(labels), EXAMPLES - sum(labels)) / EXAMPLES
    assert after.loss < 0.8 * before.loss
    assert after.accuracy is not None and after.accuracy > majority + 0.05
    export(rundir, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        guesses = model(**tokens(sentences, padding=True, return_tensors="pt")).logits.argmax(-1)
    assert accuracy_score(labels, guesses) == pytest.approx(after.accuracy)
    assert matthews_corrcoef(labels, guesses) == pytest.approx(after.metrics["matthews"])
