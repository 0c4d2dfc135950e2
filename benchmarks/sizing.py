"""python -m benchmarks.sizing: which model, method, ZeRO stage and offload fits which GPU, and what the host needs.

Everything is estimated, nothing measured on a GPU: what a method keeps is counted by trainer.memory, the rest follows
the terms and assumptions in trainer.footprint's head. A GPU of N GB is taken to have N·10⁹ bytes. Gradients are
accumulated over micro-batches. Ranks and default settings of the methods are the papers' for the preset.

With --check: small runs on this machine, estimated beside what their live tensors take.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.memory import settings_of
from trainer import footprint as terms
from trainer.config import TrainingSpec
from trainer.footprint import Footprint, Way, footprint
from trainer.methodconfig import METHOD_CONFIGS
from trainer.presets import PRESETS

GIGA, MEGA = 10**9, 10**6
GPUS = (8, 16, 24, 40, 48, 80, 141)
MODELS = ("llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b")
METHODS = ("full", "galore", "flora", "lora", "loro")
WAYS = {
    "2": Way(zero_stage=2),
    "2, recomputing": Way(zero_stage=2, activation_checkpointing=True),
    "2, recomputing, state on the host": Way(zero_stage=2, activation_checkpointing=True, offload="cpu"),
    "3, recomputing, all on the host": Way(
        zero_stage=3, activation_checkpointing=True, offload="cpu", offload_parameters="cpu"
    ),
    "3, recomputing": Way(zero_stage=3, activation_checkpointing=True),
}
# For --check: method, and what differs from galore's usual run.
CHECKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full", {}),
    ("galore", {}),
    ("galore", {"zero_stage": 3}),
    ("galore", {"dtype": "fp32", "zero_stage": 0}),
    ("galore", {"activation_checkpointing": True, "micro_batch": 8}),
    ("galore", {"offload": "cpu"}),
    ("gasare", {}),
    ("dora", {}),
    ("loro", {}),
)


@dataclass(frozen=True)
class Row:
    """`gpu`: the smallest of the asked ones that holds it, None where none does."""

    model: str
    method: str
    way: str
    gpu: int | None
    found: Footprint


def main() -> None:
    arguments = _arguments()
    heading = {"host": platform.processor() or platform.machine(), "date": str(date.today())}
    shown = {key: value for key, value in vars(arguments).items() if key not in ("json", "out", "check")}
    if arguments.check:
        rows: list[Any] = [_checked(method, changes) for method, changes in CHECKS]
        text = _check_table(rows)
    else:
        found = sizes(arguments)
        rows = [asdict(row) for row in found]
        text = _assumptions(arguments) + "\n\n" + _table(found)
    if arguments.json:
        text = json.dumps({"machine": heading, "arguments": shown, "estimated": not arguments.check, "rows": rows})
    else:
        text = f"{'Measured' if arguments.check else 'Computed'} on {heading['host']}, {heading['date']}.\n\n{text}"
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)


def sizes(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for model in arguments.model:
        for method in arguments.method:
            for name, way in WAYS.items():
                if arguments.processes == 1 and name == "3, recomputing":
                    continue  # one rank shards nothing
                way = replace(
                    way,
                    processes=arguments.processes,
                    micro_batch=arguments.micro_batch,
                    sequence_length=arguments.sequence_length,
                )
                settings = settings_of(method).resolved(model)
                found = footprint(settings, PRESETS[model], arguments.vocabulary, way)
                gpu = next((gpu for gpu in sorted(arguments.gpu) if found.device <= gpu * GIGA), None)
                rows.append(Row(model, method, name, gpu, found))
    return rows


def _assumptions(arguments: argparse.Namespace) -> str:
    each = f"{arguments.processes} GPU{'s' if arguments.processes > 1 else ''} of one host"
    context = terms.CONTEXT_OF_SEVERAL if arguments.processes > 1 else terms.CONTEXT
    return (
        f"Estimated, not measured, for {each}: bf16, sequences of {arguments.sequence_length} tokens, micro_batch "
        f"{arguments.micro_batch}, a vocabulary of {arguments.vocabulary}; methods with the preset's defaults.\n"
        f"Assumed beside tensors: {context / GIGA:g} GB of CUDA's own on each GPU, {terms.MARGIN:.0%} of the tensors "
        f"that the allocator cannot use, {terms.PROCESS / GIGA:g} GB of host memory for each process.\n"
        "Columns: ZeRO stage; recomputing is activation_checkpointing; state on the host is offload: cpu, all "
        "is offload_parameters: cpu besides.\n"
        "A cell: the smallest GPU (GB) that holds it, – where none does; in parentheses GB on the GPU; of the host."
    )


def _table(rows: list[Row]) -> str:
    ways = list(dict.fromkeys(row.way for row in rows))
    lines = [f"| model | method | {' | '.join(ways)} |", "|---|---|" + "---|" * len(ways)]
    cells = {(row.model, row.method, row.way): row for row in rows}
    for model, method in dict.fromkeys((row.model, row.method) for row in rows):
        found = [cells[model, method, way] for way in ways]
        texts = [f"{_gpu(row)} ({row.found.device / GIGA:.1f}; {row.found.host / GIGA:.0f})" for row in found]
        lines.append(f"| {model} | {method} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _gpu(row: Row) -> str:
    return "–" if row.gpu is None else f"**{row.gpu}**"


# ------------------------------------------------------------------------------------------------------------- check


def _checked(method: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One rank, two micro-batches a step, on this machine's CPU, where device and host are one."""
    way = replace(Way(micro_batch=4, sequence_length=256), **changes)
    vocabulary, model = 4096, "llama-9m"
    found = footprint(settings_of(method).resolved(model), PRESETS[model], vocabulary, way)
    # Without what is assumed.
    estimated = found.tensors + found.counted.host.total
    print(f"{method} {changes}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="stiefel-sizing-") as directory:
        text, file = Path(directory) / "text.txt", Path(directory) / "spec.json"
        # What is said does not matter, only how much.
        text.write_text(Path(__file__).read_text() * 50)
        spec = TrainingSpec.model_validate(
            {
                "model": {"preset": model, "vocabulary": vocabulary},
                "dataset": {"source": "text", "files": [str(text)], "sequence_length": way.sequence_length},
                "method": {"name": method},
                "optimisation": {
                    "steps": 1000,
                    "global_batch": 2 * way.micro_batch,
                    "micro_batch": way.micro_batch,
                    "dtype": way.dtype,
                    "activation_checkpointing": way.activation_checkpointing,
                },
                "deepspeed": {"zero_stage": way.zero_stage, "offload": way.offload},
            }
        )
        file.write_text(spec.model_dump_json())
        command = [sys.executable, "-m", "benchmarks.live", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-4000:])
    measured = json.loads(done.stdout.splitlines()[-1])
    peak = max(measured["switching"], measured["plain"])
    how = ", ".join(f"{key} {value}" for key, value in changes.items())
    return {"method": method, "way": how, "estimated": estimated, "measured": measured, "ratio": estimated / peak}


def _check_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "llama-9m, vocabulary 4096, bf16, stage 2, one rank on the CPU, 2 micro-batches of 4 sequences of 256 tokens.",
        "Live tensors, MB; the ratio is of the estimate to the larger peak.",
        "",
        "| method | differs in | at rest | peak, switching | peak, other steps | estimated | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [row["measured"][key] / MEGA for key in ("rest", "switching", "plain")] + [row["estimated"] / MEGA]
        cells = " | ".join(f"{figure:.1f}" for figure in figures)
        lines.append(f"| {row['method']} | {row['way']} | {cells} | {row['ratio']:.2f} |")
    ratios = [row["ratio"] for row in rows]
    return "\n".join(lines) + f"\n\nThe estimates are {min(ratios):.2f} to {max(ratios):.2f} of what was there."


def _gigabytes(text: str) -> int:
    return int(text.removesuffix("GB"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sizing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.sizing --model llama-1b llama-7b --method galore --gpu 24GB 80GB "
        "--processes 8",
    )
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(PRESETS))
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHOD_CONFIGS))
    parser.add_argument("--gpu", nargs="+", type=_gigabytes, default=list(GPUS), metavar="GB", help="such as 24GB")
    parser.add_argument("--processes", type=int, default=1, help="GPUs of one host, one rank each")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a GPU in a forward pass")
    parser.add_argument("--vocabulary", type=int, default=32000, help="embedding rows")
    parser.add_argument("--check", action="store_true", help="instead: estimates beside live tensors of small runs")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of printing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
