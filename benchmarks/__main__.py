"""python -m benchmarks: what can be measured here; measure it again; write docs/performance.md from what was measured.

python -m benchmarks                       list every benchmark, and what docs/performance.md shows
python -m benchmarks measure NAME…         measure, and keep the result in benchmarks/results/NAME.json
python -m benchmarks report                write docs/performance.md and its picture
"""

import argparse
import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.catalogue import BY_NAME, MEASUREMENTS, Measurement
from benchmarks.report import PAGE, RESULTS, draw, filled, result_of

_HERE = Path(__file__).parent


def main() -> None:
    arguments = _arguments()
    match arguments.command:
        case "measure":
            for name in arguments.names:
                _measure(BY_NAME[name])
        case "report":
            PAGE.write_text(filled(PAGE.read_text()))
            print("\n".join(str(path) for path in [PAGE, *draw()]))
        case _:
            _list(arguments.json)


def _list(as_json: bool) -> None:
    modules = {path.stem: line for path in sorted(_HERE.glob("*.py")) if (line := _command_line(path))}
    if as_json:
        shown = [{"name": m.name, "command": m.command, "measured": result_of(m) is not None} for m in MEASUREMENTS]
        print(json.dumps({"benchmarks": modules, "measurements": shown}, indent=1))
        return
    print("Benchmarks (each has --help):")
    for line in modules.values():
        print(f"  {line}")
    print("\nMeasurements of docs/performance.md (python -m benchmarks measure NAME…):")
    for measurement in MEASUREMENTS:
        result = result_of(measurement)
        when = result["date"] if result else "not measured"
        print(f"  {measurement.name:17} {when:13} {measurement.command}")


def _command_line(path: Path) -> str | None:
    """The first line of a command's docstring; None of a module that is none. Nothing is imported for it."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = text.splitlines()[0] if text else ""
    return first if first.startswith("python -m benchmarks.") else None


def _measure(measurement: Measurement) -> None:
    """A run that fails leaves the older result as it was."""
    print(measurement.command, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", f"benchmarks.{measurement.module}", *shlex.split(measurement.arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{measurement.name}: ended with {done.returncode}; nothing is kept")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{measurement.name}.json"
    result = _last_json(done.stdout)
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"{file}\n\n{measurement.markdown(result)}\n")


def _last_json(printed: str) -> Any:
    """What stands from the last line that is a brace alone: libraries may have printed before it."""
    lines = printed.splitlines()
    begin = max((number for number, line in enumerate(lines) if line == "{"), default=0)
    return json.loads("\n".join(lines[begin:]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks measure one-rank two-ranks-fp32 && python -m benchmarks report",
    )
    parser.add_argument("--json", action="store_true", help="list as JSON, for programs")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    measure = commands.add_parser(
        "measure", help="measure, and keep the results", epilog="example: measure peak-memory"
    )
    measure.add_argument("names", nargs="+", choices=list(BY_NAME), metavar="NAME", help=", ".join(BY_NAME))
    commands.add_parser("report", help="write docs/performance.md from the results that are there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
