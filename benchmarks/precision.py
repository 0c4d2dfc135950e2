"""python -m benchmarks.precision: what bf16 costs in loss, by where a change is kept and how it is rounded.

The same GaLore run, by `python -m trainer run`, in fp32 and in bf16: with the change beside the weight until the next
switch (`form: factored`), or in it after every step (`form: merged`); added to the nearest bf16 number, at random, or
to a copy in fp32 (`merge`). Losses are paired by seed with those of fp32: a seed sets the weights and the data's order.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.machine import described
from trainer import events
from trainer.config import TrainingSpec
from trainer.rundir import RunDir

FP32 = "fp32"
VARIANTS: dict[str, dict[str, str]] = {
    FP32: {"dtype": "fp32"},
    "bf16, factored, nearest": {"dtype": "bf16", "form": "factored"},
    "bf16, factored, fp32": {"dtype": "bf16", "form": "factored", "merge": "fp32"},
    "bf16, merged, nearest": {"dtype": "bf16", "form": "merged"},
    "bf16, merged, stochastic": {"dtype": "bf16", "form": "merged", "merge": "stochastic"},
    "bf16, merged, fp32": {"dtype": "bf16", "form": "merged", "merge": "fp32"},
}


def main() -> None:
    arguments = _arguments()
    wanted = [(name, seed) for seed in arguments.seeds for name in VARIANTS]
    with TemporaryDirectory(prefix="stiefel-precision-") as directory, ThreadPoolExecutor(arguments.jobs) as pool:
        losses = list(pool.map(lambda one: _loss(Path(directory), arguments, *one), wanted))
    runs = [{"variant": name, "seed": seed, "heldout": loss} for (name, seed), loss in zip(wanted, losses, strict=True)]
    result = described() | {"arguments": vars(arguments), "runs": runs}
    print(json.dumps(result, indent=1) if arguments.json else markdown(result))


def _loss(directory: Path, arguments: argparse.Namespace, name: str, seed: int) -> float:
    """The last held-out loss, nats a byte."""
    spec = TrainingSpec.model_validate(
        {
            "model": arguments.model,
            "dataset": {"source": "python-stdlib", "sequence_length": arguments.length},
            "method": {"name": "galore", "period": arguments.period},
            "optimisation": {
                "steps": arguments.steps,
                "global_batch": arguments.batch,
                "seed": seed,
                "evaluate_every": arguments.steps,
                "evaluation_sequences": 256,
            }
            | VARIANTS[name],
            "deepspeed": {"zero_stage": 2},
            "checkpoints": {"every": arguments.steps},
        }
    )
    rundir = RunDir(directory / f"{list(VARIANTS).index(name)}-{seed}")
    rundir.root.mkdir()
    rundir.spec.write_text(spec.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "run", str(rundir.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // arguments.jobs))},
    )
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stdout[-4000:]}")
    loss = next(
        e.loss for e in events.read(rundir.events) if isinstance(e, events.Evaluated) and e.step == arguments.steps
    )
    print(f"{name}, seed {seed}: {loss:.4f}", file=sys.stderr, flush=True)
    return loss


def markdown(result: dict[str, Any]) -> str:
    asked, runs = result["arguments"], result["runs"]
    fp32 = {run["seed"]: run["heldout"] for run in runs if run["variant"] == FP32}
    lines = [
        f"`{asked['model']}`, galore, {asked['steps']} steps of {asked['batch']}×{asked['length']} bytes, "
        f"τ {asked['period']}, seeds {asked['seeds']}; nats a byte, mean and range over the seeds",
        "",
        "| type, form, merge | held-out loss | minus fp32's, paired by seed |",
        "|---|---|---|",
    ]
    for name in VARIANTS:
        mine = [run for run in runs if run["variant"] == name]
        mean = statistics.fmean(run["heldout"] for run in mine)
        apart = [run["heldout"] - fp32[run["seed"]] for run in mine]
        differs = f"{statistics.fmean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f})" if name != FP32 else "–"
        lines.append(f"| {name} | {mean:.4f} | {differs} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.precision --steps 200 --seeds 0",
    )
    parser.add_argument("--model", default="llama-1m", help="a preset")
    parser.add_argument("--period", type=int, default=50, help="τ, steps between two subspaces")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--length", type=int, default=128, help="bytes in a sequence")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
