"""python -m benchmarks.steps: the time of one training step, methods and packages side by side in one process.

All variants hold the same model and take steps in turn on the same batches, so that whatever else the machine does
slows all of them; figures are medians over the rounds, and what matters are the ratios to the first variant, round by
round. A switch of subspaces is timed apart; `ratio with switches` is that of a step with its share of one every
`--period` steps.

`package:` variants run in a plain loop outside of any engine: galore-torch's GaLoreAdamW, and peft with torch's AdamW.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

EXAMPLE = "example: python -m benchmarks.steps --variants full galore galore:rank=64 loro --rounds 15"


def main() -> None:
    arguments = _arguments()
    if arguments.ranks > 1 and "LOCAL_RANK" not in os.environ:
        raise SystemExit(with_ranks("benchmarks.steps", arguments.ranks))
    # After the arguments: torch and DeepSpeed take seconds.
    from benchmarks.machine import described
    from benchmarks.sidebyside import device_name, measure

    found = measure(arguments)
    if os.environ["RANK"] != "0":
        return
    about = described(device_name())
    rows = rows_of(found, arguments.period, arguments.batch * arguments.length * arguments.ranks)
    result = about | {"arguments": vars(arguments), "rows": rows}
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{about['machine']}; ratios to {rows[0]['variant']}\n")
        print(markdown(result))


def rows_of(found: dict[str, dict[str, Any]], period: int, tokens: int) -> list[dict[str, Any]]:
    """Of each variant {"steps": seconds of each round, "switches": …}: medians, and ratios to the first variant."""
    base = next(iter(found.values()))
    rows = []
    for name, measured in found.items():
        step = statistics.median(measured["steps"])
        switch = statistics.median(measured["switches"]) if measured["switches"] else 0.0
        ratio = statistics.median(mine / its for mine, its in zip(measured["steps"], base["steps"], strict=True))
        mean = ratio + switch / period / statistics.median(base["steps"])
        rows.append(
            {
                "variant": name,
                "step_seconds": step,
                "ratio": ratio,
                "switched": bool(measured["switches"]),
                "switch_seconds": switch,
                "mean_ratio": mean,
                "tokens_per_second": tokens / (step + switch / period),
                "switch_share": switch / period / (step + switch / period),
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "| variant | step | ratio | switch | share of time | ratio with switches | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        switch, share = f"{row['switch_seconds']:.2f} s", f"{row['switch_share']:.1%}"
        switches = f"{switch} | {share} | {row['mean_ratio']:.3f}" if row["switched"] else "– | – | –"
        lines.append(
            f"| {row['variant']} | {row['step_seconds'] * 1e3:.0f} ms | {row['ratio']:.3f} "
            f"| {switches} | {row['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)


def with_ranks(module: str, ranks: int) -> int:
    """The same command once more, on so many ranks; what torchrun ends with."""
    from trainer.process import free_port

    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["-m", module, *sys.argv[1:]]
    return subprocess.run(command, env={"OMP_NUM_THREADS": threads} | os.environ).returncode


def add_variants(parser: argparse.ArgumentParser) -> None:
    """What is stepped: the variants, their model, their batch and their ranks."""
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["full", "galore", "galore:rank=64"],
        metavar="V",
        help="METHOD[:field=value,…] with fields of the method's settings or, after 'optimisation.', of those; or "
        "package:torch-adamw, package:galore-torch, package:peft-lora, package:peft-dora. The first is what others are "
        "compared with",
    )
    parser.add_argument("--model", default="llama-60m", help="a preset")
    parser.add_argument("--vocabulary", type=int, default=4096, help="embedding rows")
    parser.add_argument("--rank", type=int, default=128, help="where a variant names none")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a rank in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--stage", type=int, default=0, choices=[0, 1, 2, 3], help="ZeRO stage")
    parser.add_argument("--ranks", type=int, default=1, help="processes, each with its share of the cores")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_variants(parser)
    parser.add_argument("--rounds", type=int, default=11, help="steps that are timed, of each variant")
    parser.add_argument("--switches", type=int, default=1, help="switches that are timed, of each variant")
    parser.add_argument("--period", type=int, default=200, help="τ, for the share of time that switches take")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
