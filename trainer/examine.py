"""What files of examples hold, and what is wrong with them: counted, the first errors by line. Imports no torch."""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from trainer.examples import BadExample, Chat, Example, Labelled, Prompt, check_columns, example_of, format_of, read
from trainer.records import BadRecord

_MOST_ERRORS = 10
# Labels that are counted one by one; with more it is a number that is to be predicted.
_MOST_LABELS = 100


@dataclass(frozen=True)
class Problem:
    file: str
    line: int
    reason: str


@dataclass
class Report:
    format: str | None = None  # null where no record has one
    examples: int = 0
    bad: int = 0
    errors: list[Problem] = field(default_factory=list)  # the first of them
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def fine(self) -> bool:
        return self.examples > 0 and not self.bad

    def summary(self) -> str:
        """What is wrong, in a sentence; empty where nothing is."""
        if self.fine:
            return ""
        if not self.bad:
            return "the file has no examples"
        several = len({problem.file for problem in self.errors}) > 1
        lines: dict[str, list[str]] = {}
        for problem in self.errors:
            where = f"{problem.file} {problem.line}" if several else str(problem.line)
            lines.setdefault(problem.reason, []).append(where)
        told = [f"line{'s' * (len(where) > 1)} {', '.join(where)}: {reason}" for reason, where in lines.items()]
        more = [f"and {self.bad - len(self.errors):,} more"] if self.bad > len(self.errors) else []
        return "; ".join([*told, *more])

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"fine": self.fine, "summary": self.summary()}


def examine(
    paths: Iterable[Path],
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    most_errors: int = _MOST_ERRORS,
    measures: "Sequence[Measure]" = (),
) -> Report:
    """Every record of the files, which have one format. `auto`: that of the first record that has one.

    `measures` are what else is to be counted of the examples. Raises OSError for a file that cannot be read, and
    BadExample for columns that cannot be.
    """
    columns = columns or {}
    check_columns(columns)
    report, counts = Report(None if format == "auto" else format), [*measures, Statistics()]
    for path in paths:
        for record in read(path, columns):
            try:
                if isinstance(record, BadRecord):
                    raise BadExample(record.reason)
                if report.format is None:
                    report.format = format_of(record.values, columns)
                example = example_of(record.values, report.format, columns)
                for measure in counts:
                    measure.add(example)
            except BadExample as error:
                report.bad += 1
                if len(report.errors) < most_errors:
                    report.errors.append(Problem(path.name, record.line, error.reason))
            else:
                report.examples += 1
    for measure in reversed(counts):
        report.statistics |= measure.result()
    return report


class Measure(Protocol):
    def add(self, example: Example) -> None:
        """Raises BadExample for one that it cannot take; no other measure has seen it then but those before it."""

    def result(self) -> dict[str, Any]: ...


class Statistics:
    """Of examples, as they pass by: of each no more than a number is kept."""

    def __init__(self) -> None:
        self._characters = array("Q")
        self._roles: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()

    def add(self, example: Example) -> None:
        self._characters.append(characters_of(example))
        if isinstance(example, Chat):
            self._roles.update(message["role"] for message in example.messages)
        elif isinstance(example, Labelled) and len(self._labels) <= _MOST_LABELS and example.label is not None:
            # A database takes no NUL in a key.
            self._labels[example.label[:100].replace("\0", "\ufffd")] += 1

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "characters": sum(self._characters),
            "characters_per_example": spread(self._characters),
        }
        if self._roles:
            found |= {"messages": self._roles.total(), "roles": dict(self._roles.most_common())}
        if 0 < len(self._labels) <= _MOST_LABELS:
            found["labels"] = dict(self._labels.most_common())
        return found


def characters_of(example: Example) -> int:
    if isinstance(example, Chat):
        return sum(len(message.get("content") or "") for message in example.messages)
    if isinstance(example, Prompt):
        return len(example.prompt) + len(example.completion)
    if isinstance(example, Labelled):
        return len(example.text) + len(example.pair or "")
    return len(example.text)


def spread(values: "array[int]") -> dict[str, float] | None:
    return {"min": min(values), "median": median(values), "max": max(values)} if values else None
