"""python -m benchmarks.peak: the most bytes of live tensors in a training step, by method, activations aside.

Counted as torch makes and drops them (benchmarks.live), of one rank that trains one sequence of eight tokens: what is
left are weights, bases, moments and gradients, and the switch of the subspaces. Ratios are to the first method.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import described

TOKENS = 8
DEFAULT = ["full", "galore", "galore:rank=64", "loro:period=100", "lora"]
PLACES = [("fp32", 0), ("fp32", 2), ("bf16", 2)]


def main() -> None:
    arguments = _arguments()
    rows = []
    for dtype, stage in PLACES:
        base: int | None = None
        for variant in arguments.variants:
            print(f"{dtype}, ZeRO-{stage}: {variant}", file=sys.stderr, flush=True)
            found = _measured(_spec(variant, arguments, dtype, stage))
            base = base or found["plain"]
            row = {"dtype": dtype, "stage": stage, "variant": variant, **found}
            rows.append(row | {"ratio": found["plain"] / base, "switch_ratio": found["switching"] / base})
    result = described() | {"arguments": vars(arguments), "rows": rows}
    print(json.dumps(result, indent=1) if arguments.json else markdown(result))


def _spec(variant: str, arguments: argparse.Namespace, dtype: str, stage: int) -> dict[str, Any]:
    name, _, settings = variant.partition(":")
    method: dict[str, Any] = {"name": name}
    if name != "full":
        method["rank"] = arguments.rank
    for setting in filter(None, settings.split(",")):
        field, _, text = setting.partition("=")
        method[field] = int(text) if text.isdigit() else text
    return {
        "model": {"preset": arguments.model, "vocabulary": 4096},
        "dataset": {"source": "python-stdlib", "sequence_length": TOKENS},
        "method": method,
        "optimisation": {"steps": 1000, "global_batch": 1, "dtype": dtype, "learning_rate": 1e-4},
        "deepspeed": {"zero_stage": stage},
    }


def _measured(spec: dict[str, Any]) -> dict[str, int]:
    """Bytes, as `benchmarks.live.Measured`; in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        Path(file.name).write_text(json.dumps(spec))
        command = [sys.executable, "-m", "benchmarks.live", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-4000:])
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "| type, ZeRO stage | variant | between steps | most in a step | ratio | with a switch |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        megabytes = " | ".join(f"{row[key] / 1e6:,.0f} MB" for key in ("rest", "plain"))
        ratios = f"{row['ratio']:.3f} | {row['switch_ratio']:.3f}"
        lines.append(f"| {row['dtype']}, {row['stage']} | {row['variant']} | {megabytes} | {ratios} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.peak --variants full galore galore:rank=64",
    )
    parser.add_argument("--variants", nargs="+", default=DEFAULT, metavar="V", help="METHOD[:field=value,…]")
    parser.add_argument("--model", default="llama-60m", help="a preset")
    parser.add_argument("--rank", type=int, default=128, help="where a variant names none")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
