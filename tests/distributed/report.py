"""python -m tests.distributed.report RESULTS.jsonl: what `make test-matrix` measured, as tables in docs/zero.md.

Each line of RESULTS is a case of the matrix and how far it was from the reference; see test_matrix.py.
"""

import argparse
import json
import os
import platform
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path

import torch

from tests.distributed.matrix import ENGINES, METHODS, TYPES, Case, every_case
from tests.distributed.refusals import refusals

PAGE = Path(__file__).parents[2] / "docs" / "zero.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.distributed.report",
        description=__doc__,
        epilog="example: python -m tests.distributed.report .stiefel/matrix.jsonl",
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    given = parser.parse_args()
    worst: dict[tuple[str, str, str], float] = defaultdict(float)
    losses: dict[str, float] = defaultdict(float)
    cases = set()
    for line in given.results.read_text().splitlines():
        found = json.loads(line)
        case = Case(*found["case"])
        cases.add(case)
        key = (case.type, case.method, case.engine)
        worst[key] = max(worst[key], found["weights"])
        losses[case.type] = max(losses[case.type], found["losses"])
    with tempfile.TemporaryDirectory() as directory:
        every, _ = every_case(Path(directory))
        refused = refusals(Path(directory))
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    body = "\n".join(
        [
            f"{len(cases)} of {len(every)} cases, {date.today()}, on {_processor()}, torch {torch.__version__}, gloo. "
            "A cell is the largest deviation over 1, 2 and 3 ranks, accumulation 1 and 2, with and without activation "
            "checkpointing.",
            "",
            *(line for kind in TYPES for line in _table(kind, worst, losses[kind])),
            "### Refused",
            "",
            *refused,
        ]
    )
    PAGE.write_text(f"{head}{BEGIN}\n{body}\n{END}{tail}")
    print(f"{len(cases)} cases → {PAGE}")


def _table(kind: str, worst: dict[tuple[str, str, str], float], loss: float) -> list[str]:
    """Rows are methods, columns engines; a dash where a combination is refused or was not trained."""
    fp32 = kind.startswith("fp32")
    what = "largest |W − W_ref|" if fp32 else "largest ‖W − W_ref‖ / ‖W_ref − W_start‖ of a matrix"
    engines = [engine for engine in ENGINES if any((kind, method, engine) in worst for method in METHODS)]
    lines = [f"### {kind}", "", f"{what}; losses off by at most {loss:.1e}.", ""]
    lines += [f"| method | {' | '.join(engines)} |", "|---|" + "---|" * len(engines)]
    for method in METHODS:
        cells = [worst.get((kind, method, engine)) for engine in engines]
        if any(cell is not None for cell in cells):
            shown = (("–" if cell is None else f"{cell:.0e}" if fp32 else f"{cell:.2f}") for cell in cells)
            lines.append(f"| {method} | {' | '.join(shown)} |")
    return [*lines, ""]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


if __name__ == "__main__":
    main()
