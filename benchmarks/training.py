"""python -m benchmarks.training: methods side by side on this machine, in one run, through the product's own trainer.

Every variant trains the same model on the same batches. Variants are interleaved over the repetitions, so that a
machine that slows down slows all of them; figures are medians, and what matters are the ratios to the first variant.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from typing import Any

from trainer import events
from trainer.config import TrainingSpec
from trainer.rundir import RunDir

METHODS = {
    "full": {"name": "full"},
    "galore": {"name": "galore"},
    "galore-randomized": {"name": "galore", "svd": "randomized"},
}


def main() -> None:
    arguments = _arguments()
    variants = {
        f"{method} ZeRO-{stage}{'' if offload == 'none' else f' offload {offload}'}": (method, stage, offload)
        for stage in arguments.stages
        for offload in arguments.offload
        if not (stage == 0 and offload != "none")
        for method in arguments.methods
    }
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for repetition in range(arguments.repetitions):
        for name, variant in variants.items():
            print(f"[{repetition + 1}/{arguments.repetitions}] {name}", file=sys.stderr, flush=True)
            measured[name].append(_measure(arguments, *variant))
    rows = [_row(name, found, measured[next(iter(variants))]) for name, found in measured.items()]
    machine = {
        "device": rows[0]["device"],
        "host": platform.processor() or platform.machine(),
        "date": str(date.today()),
    }
    if arguments.json:
        print(json.dumps({"machine": machine, "arguments": vars(arguments), "rows": rows}, indent=1))
    else:
        _print(machine, rows)


def _measure(arguments: argparse.Namespace, method: str, stage: int, offload: str) -> dict[str, Any]:
    low_rank = {"rank": arguments.rank, "period": arguments.period} if method != "full" else {}
    spec = TrainingSpec.model_validate(
        {
            "model": {"preset": arguments.model, "vocabulary": arguments.vocabulary},
            "dataset": {"source": "python-stdlib", "sequence_length": arguments.length},
            "method": METHODS[method] | low_rank,
            "optimisation": {
                "steps": arguments.steps,
                "global_batch": arguments.batch,
                "micro_batch": arguments.micro_batch,
                "dtype": arguments.dtype,
                "learning_rate": 1e-3,
                "evaluate_every": arguments.steps,
            },
            "deepspeed": {"zero_stage": stage, "offload": offload},
            "checkpoints": {"every": arguments.steps},
            "resources": {"processes": arguments.processes},
        }
    )
    with tempfile.TemporaryDirectory(prefix="stiefel-benchmark-") as directory:
        rundir = RunDir(directory)
        rundir.spec.write_text(spec.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "run", directory],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(done.stdout[-4000:])
        return _figures(list(events.read(rundir.events)), arguments.period)


def _figures(found: list[events.Event], period: int) -> dict[str, Any]:
    started = next(e for e in found if isinstance(e, events.Started))
    steps = [e for e in found if isinstance(e, events.Step)]
    # The first steps warm caches and allocators up.
    warm = steps[len(steps) // 4 :]
    plain = [e.seconds for e in warm if e.projection_seconds == 0] or [e.seconds for e in warm]
    switching = [e.seconds for e in warm if e.projection_seconds > 0]
    switches = [e.projection_seconds for e in warm if e.projection_seconds > 0]
    # A period has one step with a switch, and the others.
    median = statistics.median(plain)
    mean = (median * (period - 1) + statistics.median(switching)) / period if switching else median
    return {
        "device": started.device,
        "step_seconds": mean,
        "tokens_per_second": started.tokens_per_step / mean,
        "switch_seconds": statistics.median(switches) if switches else 0.0,
        "peak_bytes": steps[-1].peak_device_bytes or steps[-1].peak_host_bytes,
        "state_bytes": started.optimizer_state_bytes,
        "last_loss": steps[-1].loss,
    }


def _row(name: str, found: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name, "device": found[0]["device"], "last_loss": found[0]["last_loss"]}
    for key in ("step_seconds", "tokens_per_second", "switch_seconds", "peak_bytes", "state_bytes"):
        row[key] = statistics.median(run[key] for run in found)
    for key in ("step_seconds", "peak_bytes", "state_bytes"):
        row[f"{key}_ratio"] = row[key] / statistics.median(run[key] for run in base)
    return row


def _print(machine: dict[str, str], rows: list[dict[str, Any]]) -> None:
    print(f"{machine['device']}, {machine['host']}, {machine['date']}; ratios to {rows[0]['variant']}\n")
    print("| variant | step | ratio | tokens/s | switch | peak memory | ratio | optimizer state | ratio | last loss |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['variant']} | {row['step_seconds'] * 1e3:.1f} ms | {row['step_seconds_ratio']:.2f} "
            f"| {row['tokens_per_second']:,.0f} | {row['switch_seconds']:.3f} s | {row['peak_bytes'] / 1e6:,.0f} MB "
            f"| {row['peak_bytes_ratio']:.2f} | {row['state_bytes'] / 1e6:,.1f} MB | {row['state_bytes_ratio']:.2f} "
            f"| {row['last_loss']:.3f} |"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        epilog="example: python -m benchmarks.training --model llama-9m --rank 72 --stages 2 --steps 20",
    )
    parser.add_argument("--model", default="llama-9m", help="a preset")
    parser.add_argument("--vocabulary", type=int, default=4096, help="embedding rows")
    parser.add_argument("--rank", type=int, default=72)
    parser.add_argument("--period", type=int, default=10, help="steps between two subspaces")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--micro-batch", type=int, default=None, help="sequences of a rank in a forward pass")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--stages", type=int, nargs="+", default=[2], choices=[0, 1, 2, 3])
    parser.add_argument("--offload", nargs="+", default=["none"], choices=["none", "cpu"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
