"""python -m trainer examine: what files of examples hold, and with a tokeniser, how long they are.

Imports no torch, unless there is a tokeniser other than `bytes` to be counted with.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from trainer.bytecount import count_bytes
from trainer.errors import DataError, SpecError
from trainer.examine import Measure, Report, examine
from trainer.examples import FORMATS, BadExample
from trainer.lengths import Count, FileTokens, Lengths


def add_to(commands: Any) -> None:
    """As a command of a parser."""
    command = commands.add_parser(
        "examine",
        help="look through files of examples: format, errors with their lines, statistics",
        epilog="example: python -m trainer examine train.jsonl --tokenizer Qwen/Qwen3-0.6B --columns "
        '\'{"prompt": "question", "completion": "answer"}\'. Ends with 65 where something is wrong',
    )
    command.add_argument("files", metavar="FILE", nargs="+", help="JSON lines, CSV, TSV or Parquet")
    command.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="default: by the first example")
    command.add_argument("--columns", metavar="JSON", default="{}", help="what fields are called in the files")
    counted = command.add_mutually_exclusive_group()
    counted.add_argument("--tokenizer", metavar="T", help="count tokens: bytes, a directory, or a name of the hub")
    counted.add_argument(
        "--count",
        metavar="T",
        help="count tokens as the service does, into statistics.tokens: what T's chat template refuses is counted "
        "apart, and no error",
    )
    command.add_argument("--sequence-length", type=int, metavar="N", help="say how many examples have more tokens")
    command.add_argument("--errors", type=int, default=10, metavar="N", help="tell at most so many. Default: 10")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    columns = _columns(arguments.columns)
    paths = [Path(file) for file in arguments.files]
    measures: list[Measure] = []
    with redirect_stdout(sys.stderr):  # for what libraries say while they are imported
        if arguments.tokenizer is not None:
            measures.append(Lengths(counter(arguments.tokenizer), arguments.sequence_length))
        if arguments.count is not None:
            measures.append(FileTokens(arguments.count, counter(arguments.count)))
    try:
        report = examine(paths, arguments.format, columns, arguments.errors, measures)
    except BadExample as error:
        raise SpecError(f"--columns: {error}") from error
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    print(json.dumps(report.as_json()) if arguments.json else _told(report))
    return 0 if report.fine else DataError.exit_code


def counter(tokenizer: str) -> Count:
    """Of `bytes`, a directory, or a hub id. Raises SpecError, or TrainerError where the hub cannot be reached."""
    if tokenizer == "bytes":
        return count_bytes
    try:
        from trainer.tokencount import TokenCounter
    except ModuleNotFoundError as error:
        raise SpecError(
            f"tokenizer: {tokenizer!r} needs {error.name}, which is not installed here; pip install "
            "'stiefel[tokenizers]' brings it, and 'bytes' needs nothing"
        ) from error
    return TokenCounter(tokenizer)


def _columns(text: str) -> Mapping[str, str]:
    try:
        columns = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"--columns: {text[:100]!r} is no JSON object: {error}") from error
    if not isinstance(columns, dict) or not all(isinstance(column, str) for column in columns.values()):
        raise SpecError(f"--columns: {text[:100]!r} is no JSON object of names")
    return columns


def _told(report: Report) -> str:
    lines = [f"format      {report.format or 'unknown'}", f"examples    {report.examples:,}"]
    for name, value in report.statistics.items():
        shown = ", ".join(f"{key} {_shown(part)}" for key, part in value.items()) if isinstance(value, dict) else value
        lines.append(f"{name.replace('_', ' '):11} {shown:,}" if isinstance(shown, int) else f"{name:11} {shown}")
    lines += [f"{problem.file}:{problem.line}: {problem.reason}" for problem in report.errors]
    if report.bad > len(report.errors):
        lines.append(f"and {report.bad - len(report.errors):,} more that are wrong")
    if not report.examples:
        lines.append("there are no examples")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)
