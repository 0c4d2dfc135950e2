"""What `python -m trainer examine` says of files, against what is counted another way."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.datasets import DATA
from trainer.examine import Statistics, examine
from trainer.examples import BadExample, Labelled
from trainer.tokenizer import byte_tokenizer

CHAT = {"messages": [{"role": "user", "content": "Which tree?"}, {"role": "assistant", "content": "A larch."}]}


def file(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def command(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "trainer", "examine", *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code else "")


def test_files_are_counted_together(tmp_path: Path) -> None:
    first = file(tmp_path / "a.jsonl", {"prompt": "abc", "completion": "de"}, {"prompt": "", "completion": "x"})
    second = file(tmp_path / "b.jsonl", {"prompt": "a" * 9, "completion": "b"})
    report = examine([first, second])
    assert (report.fine, report.format, report.examples, report.bad, report.summary()) == (True, "prompt", 3, 0, "")
    assert report.statistics == {"characters": 16, "characters_per_example": {"min": 1, "median": 5, "max": 10}}


def test_errors_are_told_with_their_place_and_the_rest_counted(tmp_path: Path) -> None:
    first = file(tmp_path / "a.jsonl", "{\n", CHAT, {"text": "a"})
    second = file(tmp_path / "b.jsonl", *[{"messages": []}] * 30)
    report = examine([first, second], most_errors=4)
    assert (report.fine, report.format, report.examples, report.bad) == (False, "chat", 1, 32)
    assert [(error.file, error.line) for error in report.errors] == [
        ("a.jsonl", 1),
        ("a.jsonl", 3),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]
    assert report.summary().endswith("; and 28 more")


def test_columns_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadExample, match="'question' is no field"):
        examine([file(tmp_path / "a.jsonl", CHAT)], columns={"question": "prompt"})


def test_labels_are_counted_while_they_are_classes() -> None:
    few, many = Statistics(), Statistics()
    for number in range(500):
        few.add(Labelled("a", None, str(number % 3)))
        many.add(Labelled("a", "b", str(number)))
    assert few.result()["labels"] == {"0": 167, "1": 167, "2": 166}
    assert "labels" not in many.result()


def test_tokens_are_those_of_the_tokeniser(tmp_path: Path) -> None:
    texts = ["a larch", "Ünïcödé 木 🌲", "x" * 50]
    lengths = [len(byte_tokenizer()(text)["input_ids"]) + 1 for text in texts]  # and the end of the text
    path = file(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    report = json.loads(command(path, "--tokenizer", "bytes", "--sequence-length", "20", "--json"))
    found = report["statistics"]
    assert found["tokens"] == sum(lengths)
    assert found["tokens_per_example"] == {"min": min(lengths), "median": median(lengths), "max": max(lengths)}
    assert found["longer_examples"] == sum(length > 20 for length in lengths)
    # The first token is predicted from nothing.
    assert found["tokens_learnt"] == sum(lengths) - len(texts)


def test_for_people_it_is_a_table(tmp_path: Path) -> None:
    shown = command(file(tmp_path / "a.jsonl", *[CHAT] * 1200))
    assert "examples    1,200" in shown
    assert "roles       user 1,200, assistant 1,200" in shown
    shown = command(file(tmp_path / "a.jsonl", CHAT, "{}\n"), code=65)
    assert "a.jsonl:2: messages is missing" in shown


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    path = file(tmp_path / "a.jsonl", CHAT)
    assert "none.jsonl: No such file" in command(tmp_path / "none.jsonl", code=65)
    for columns in ("[", "[]", '{"question": "prompt"}', "[" * 10_000):
        assert "--columns" in command(path, "--columns", columns, code=64)
    assert "tokenizer" in command(path, "--tokenizer", str(tmp_path), code=64)


def test_real_data_is_read_whole() -> None:
    if not (DATA / "gsm8k-train.jsonl").exists():
        pytest.skip(f"{DATA} has no GSM8K")
    gsm8k = examine([DATA / "gsm8k-train.jsonl"], columns={"prompt": "question", "completion": "answer"})
    assert (gsm8k.fine, gsm8k.format, gsm8k.examples) == (True, "prompt", 7473)
    e2e = examine([DATA / "e2e-devset.csv"], columns={"prompt": "mr", "completion": "ref"})
    assert (e2e.fine, e2e.examples) == (True, 4672)
    cola = examine([DATA / "cola-train.tsv"], columns={"text": "4", "label": "2"})
    assert (cola.fine, cola.examples, cola.statistics["labels"]) == (True, 8551, {"1": 6023, "0": 2528})
