"""Labelled files as others publish them: GLUE's TSV and the hub's Parquet are the same examples; errors say where."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.datasets import COLA
from tests.trainer.classify.made import base, sentences, spec, tokenizer, write
from trainer import events, glue
from trainer.classify.files import each_labelled
from trainer.classify.labels import completed, in_order, place_of
from trainer.datasetconfig import LabelledDataset
from trainer.errors import DataError, SpecError
from trainer.prepare import prepare
from trainer.prepared import Prepared
from trainer.rundir import RunDir

# The header, a record, and the same record's (text, pair, label) of GLUE's own files.
OFFICIAL: dict[str, tuple[list[str] | None, list[str], tuple[str, str | None, str]]] = {
    "cola": (None, ["gj04", "1", "", 'He said "go.'], ('He said "go.', None, "acceptable")),
    "sst2": (["sentence", "label"], ["a joy ", "1"], ("a joy ", None, "positive")),
    "mrpc": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
             ["0", "7", "8", "A", "B"], ("A", "B", "not_equivalent")),
    "qqp": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            ["1", "2", "3", "A", "B", "1"], ("A", "B", "duplicate")),
    "stsb": (["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2",
              "score"],
             ["0", "g", "f", "y", "1", "s", "t", "A", "B", "2.600"], ("A", "B", "2.600")),
    "mnli": (["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
              "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"],
             ["0", "1", "2", "g", "p", "p", "p", "p", "A", "B", "neutral", "neutral"], ("A", "B", "neutral")),
    "qnli": (["index", "question", "sentence", "label"],
             ["0", "A", "B", "not_entailment"], ("A", "B", "not_entailment")),
    "rte": (["index", "sentence1", "sentence2", "label"], ["0", "A", "B", "entailment"], ("A", "B", "entailment")),
    "wnli": (["index", "sentence1", "sentence2", "label"], ["0", "A", "B", "1"], ("A", "B", "entailment")),
}  # fmt: skip
HUB = {
    "cola": ("sentence", None), "sst2": ("sentence", None), "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"), "stsb": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"), "rte": ("sentence1", "sentence2"), "wnli": ("sentence1", "sentence2"),
}  # fmt: skip


def found(file: Path, task: str) -> list[tuple[str, str | None, str | float]]:
    dataset = LabelledDataset(files=(str(file),), glue=task)
    labels = dataset.labels

    def named(label: str | None) -> str | float:
        assert label is not None
        if labels is None:
            return float(label)
        place = place_of(label, labels)
        assert place is not None
        return labels[place]

    return [(e.text, e.pair, named(e.label)) for _, e in each_labelled(dataset, "files")]


@pytest.mark.parametrize("task", glue.TASKS)
def test_official_files_and_the_hub_s_hold_the_same_examples(tmp_path: Path, task: str) -> None:
    header, record, (text, pair, label) = OFFICIAL[task]
    lines = [record, record] if header is None else [header, record, record]
    (tmp_path / "train.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    labels = glue.TASKS[task].labels
    one: tuple[str, str | None, str | float] = (text, pair, label if labels else float(label))
    assert found(tmp_path / "train.tsv", task) == [one, one]
    first, second = HUB[task]
    number = labels.index(label) if labels else float(label)
    row = {first: text, "label": number, "idx": 0} | ({second: pair} if second else {})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "train.parquet")
    assert found(tmp_path / "train.parquet", task) == [one, one]
    write(tmp_path / "train.jsonl", [row, row])
    assert found(tmp_path / "train.jsonl", task) == [one, one]


def test_what_is_no_file_of_the_task_or_has_no_labels_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("text\tlabel\nA\t1\n")
    with pytest.raises(DataError, match=r"a\.tsv, line 2: is no file of GLUE's rte, which has the columns sentence1"):
        found(file, "rte")
    write(tmp_path / "test.jsonl", [{"sentence": "A", "label": -1}])
    with pytest.raises(DataError, match=r"line 1: has the label -1, which stands for none"):
        found(tmp_path / "test.jsonl", "cola")


@pytest.mark.skipif(not COLA.exists(), reason="CoLA is not here")
def test_cola_as_its_authors_publish_it_is_read_whole() -> None:
    records = found(COLA, "cola")
    with COLA.open(newline="") as file:
        plain = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(records) == len(plain) == 8551
    assert [(text, label == "acceptable") for text, _, label in records] == [(row[3], row[1] == "1") for row in plain]


def prepared(directory: Path, kind: str = "roberta", **changes: Any) -> tuple[Prepared, dict[str, Any], list[Any]]:
    rundir, told = RunDir(directory / "run"), list[Any]()
    prepare(spec(directory, kind, **changes), rundir, 0, told.append, lambda: False)
    meta = json.loads((rundir.data / "meta.json").read_text())
    return Prepared(rundir.data, meta), meta, told


@pytest.mark.parametrize("kind", ["roberta", "bert", "llama"])
def test_tokens_are_those_of_the_tokeniser_and_of_a_pair_the_longer_is_cut(tmp_path: Path, kind: str) -> None:
    records = sentences(40, pairs=True)
    write(tmp_path / "sentences.jsonl", records)
    examples, meta, told = prepared(tmp_path, kind, dataset={"sequence_length": 16})
    plain = tokenizer(kind)
    cut = 0
    for number, record in enumerate(records):
        wanted = plain(record["text"], record["pair"], truncation=True, max_length=16)
        ids, segments = examples[number]
        assert ids.tolist() == wanted["input_ids"]
        assert segments.tolist() == wanted.get("token_type_ids", [0] * len(ids))
        whole = len(plain(record["text"], record["pair"])["input_ids"])
        assert examples.wholes[number] == whole
        cut += whole > 16
    assert 0 < cut == meta["truncated"]
    (event,) = [e for e in told if isinstance(e, events.Prepared)]
    assert (event.examples, event.held_out, event.trained_tokens, event.truncated) == (30, 10, 30, cut)


def test_labels_are_found_in_order_and_kept(tmp_path: Path) -> None:
    assert in_order(["10", "9", "-1"]) == ("-1", "9", "10")
    assert in_order(["b", "10", "9"]) == ("10", "9", "b")
    assert (place_of("b", ("a", "b")), place_of("1", ("a", "b")), place_of("2", ("a", "b"))) == (1, 1, None)
    assert place_of("0", ("1", "0")) == 1
    assert place_of("0", ("1", "2")) is None  # else 0 and 1 would be one class
    write(tmp_path / "sentences.jsonl", [{"text": "good", "label": label} for label in (3, 1, 2.0, "1")])
    examples, _, _ = prepared(tmp_path, dataset={"labels": None})
    assert examples.values.tolist() == [2, 0, 1, 0]
    resolved = completed(spec(tmp_path, dataset={"labels": None}), RunDir(tmp_path / "run"))
    assert isinstance(resolved.dataset, LabelledDataset)
    assert resolved.dataset.labels == ("1", "2", "3")


@pytest.mark.parametrize(
    ("records", "dataset", "message"),
    [
        ([{"text": "good", "label": "maybe"}], {}, r"line 1: label 'maybe' is none of neg, pos"),
        ([{"text": "good", "label": None}], {}, r"line 1: label is missing"),
        ([{"text": "good", "label": "pos"}], {"kind": "number", "labels": None}, r"line 1: label 'pos' is no number"),
        ([{"text": "good", "label": "pos"}], {"labels": None}, r"hold 1 labels \(pos\); a classifier needs two"),
        ([{"text": "", "label": "pos"}], {}, r"line 1: text is empty"),
        ([{"label": "pos"}], {}, r"line 1: text is missing"),
        ([], {}, "they are empty"),
        ([{"text": "a", "label": str(n)} for n in range(1001)], {"labels": None}, "1001 different labels"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(
    tmp_path: Path, records: list[dict[str, Any]], dataset: dict[str, Any], message: str
) -> None:
    write(tmp_path / "sentences.jsonl", records)
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, dataset=dataset)


def test_examples_that_are_counted_otherwise_and_a_tokeniser_that_cannot_pad_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="dataset.examples: 7 is given, but the files hold 60"):
        prepared(tmp_path, dataset={"examples": 7})
    plain = tokenizer("llama")
    plain.eos_token = None
    plain.save_pretrained(base(tmp_path, "llama"))
    with pytest.raises(SpecError, match="neither a padding nor an end-of-text token"):
        prepared(tmp_path, "llama")
