"""The tasks of GLUE (Wang et al. 2019): their files' columns, labels and metrics. Imports no torch.

Files are the official TSV ones, as gluebenchmark.com packs them (CoLA's, also its authors' own, has no header), or the
Parquet files of the hub's `nyu-mll/glue`, or JSON lines with the same columns. Which one a file is follows from the
columns that it has.

Metrics are those that the papers of our methods report (GaLore appendix D.1, LORO appendix A.2): Matthews correlation
for CoLA, Pearson's for STS-B, F1 for MRPC, accuracy for all others; then those that GLUE has beside them. F1 is that of
the second label.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """`files`: what (text, pair, label) are called, for each form of file; `labels`: in the order of the hub's numbers.

    `metrics`: the first one judges a run. A task without labels is a regression.
    """

    files: tuple[dict[str, str], ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)


def _columns(text: str, pair: str | None, label: str) -> dict[str, str]:
    return {"text": text, "label": label} | ({"pair": pair} if pair else {})


_BOTH = _columns("sentence1", "sentence2", "label")
TASKS: dict[str, Task] = {
    "cola": Task(
        # Source, label, the author's own mark, sentence.
        (_columns("4", None, "2"), _columns("sentence", None, "label")),
        ("unacceptable", "acceptable"),
        ("matthews", "accuracy"),
    ),
    "sst2": Task((_columns("sentence", None, "label"),), ("negative", "positive")),
    "mrpc": Task(
        (_columns("#1 String", "#2 String", "Quality"), _BOTH), ("not_equivalent", "equivalent"), ("f1", "accuracy")
    ),
    "qqp": Task(
        (_columns("question1", "question2", "is_duplicate"), _columns("question1", "question2", "label")),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
    ),
    "stsb": Task((_columns("sentence1", "sentence2", "score"), _BOTH), None, ("pearson", "spearman")),
    "mnli": Task(
        (_columns("sentence1", "sentence2", "gold_label"), _columns("premise", "hypothesis", "label")),
        ("entailment", "neutral", "contradiction"),
    ),
    "qnli": Task((_columns("question", "sentence", "label"),), ("entailment", "not_entailment")),
    "rte": Task((_BOTH,), ("entailment", "not_entailment")),
    "wnli": Task((_BOTH,), ("not_entailment", "entailment")),
}


def name_of(given: str) -> str | None:
    """A task's name here, for SST-2, sst2 or sst_2; None where there is none."""
    name = "".join(character for character in given.lower() if character.isalnum())
    return name if name in TASKS else None


def columns_of(task: str, values: Mapping[str, Any]) -> dict[str, str] | None:
    """What the fields are called in a file that has such values; None where it is no file of the task."""
    return next((columns for columns in TASKS[task].files if set(columns.values()) <= set(values)), None)
