"""python -m benchmarks.pretrain: losses of all methods at equal steps, tuned alike, over several seeds.

Every run is the product's own: `python -m trainer run` on a LLaMA preset and the source of Python's standard library,
as bytes. Full training is tuned first. Its best rate is then the rate of embeddings, head and norms for every method,
and each method's own rate is tuned beside it on the same grid; tuning uses a seed of its own. Losses are paired by seed
with full training's: a seed sets the initial weights and the order of the data.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.machine import machine
from trainer import events
from trainer.config import TrainingSpec
from trainer.errors import DivergenceError
from trainer.presets import usual_rank
from trainer.rundir import RunDir

TUNING_SEED = 1000


@dataclass(frozen=True)
class Outcome:
    """Of one run. Losses are nats per byte; `heldout` is NaN where the run diverged."""

    method: str
    rate: float
    seed: int
    heldout: float
    training: float
    state_bytes: int
    trained_parameters: int


def variants(period: int) -> dict[str, dict[str, Any]]:
    """Settings by the name that the table shows. Scales that stand beside a tuned rate are 1."""
    plain = {"period": period, "alpha": 1.0}
    return {
        "full": {"name": "full"},
        "galore": {"name": "galore"} | plain,
        "golore": {"name": "golore", "random_fraction": 0.2} | plain,
        "galore_plus": {"name": "galore_plus", "residual_warmup": period} | plain,
        "gasare": {"name": "gasare"} | plain,
        "gosare": {"name": "gosare"} | plain,
        "flora": {"name": "flora"} | plain,
        "garare": {"name": "garare"} | plain,
        "loro": {"name": "loro", "period": period},
        "lowrank": {"name": "lowrank"},
        "lora": {"name": "lora"},
        "dora": {"name": "dora"},
        "relora": {"name": "relora", "period": 2 * period, "restart_warmup": 10},
        "sltrain": {"name": "sltrain"},
    }


def main() -> None:
    arguments = _arguments()
    chosen = {name: v for name, v in variants(arguments.period).items() if name in {"full", *arguments.methods}}
    with TemporaryDirectory(prefix="stiefel-pretrain-") as directory:
        bench = Bench(arguments, Path(directory))
        rates = {"full": bench.best("full", chosen["full"], None)}
        others = [name for name in chosen if name != "full"]
        rates |= bench.best_of_each({name: chosen[name] for name in others}, rates["full"])
        wanted = [
            (name, chosen[name], rates[name], None if name == "full" else rates["full"], seed)
            for seed in arguments.seeds
            for name in chosen
        ]
        outcomes = bench.run(wanted)
    report = {"machine": machine(), "command": _command(), "rates": rates, "runs": [asdict(o) for o in outcomes]}
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    text = _page(arguments, outcomes, rates)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + _after_the_losses(arguments.out))


Wanted = tuple[str, dict[str, Any], float, float | None, int]


class Bench:
    """Runs trainings, several at a time, each in a directory of its own with the tokens of the first."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments, self.directory = arguments, directory
        self.done = 0
        self.tokens: Path | None = None

    def best(self, name: str, method: dict[str, Any], others: float | None) -> float:
        return self.best_of_each({name: method}, others)[name]

    def best_of_each(self, methods: dict[str, dict[str, Any]], others: float | None) -> dict[str, float]:
        """The rate of the grid with the lowest held-out loss, for each method."""
        grid = [(n, m, rate, others, TUNING_SEED) for n, m in methods.items() for rate in self.arguments.rates]
        found = self.run(grid)
        rates = {}
        for name in methods:
            mine = [o for o in found if o.method == name and not math.isnan(o.heldout)]
            if not mine:
                raise SystemExit(
                    f"{name} diverged at every rate of {self.arguments.rates}; add smaller ones to --rates"
                )
            rates[name] = min(mine, key=lambda o: o.heldout).rate
        return rates

    def run(self, wanted: list[Wanted]) -> list[Outcome]:
        if self.tokens is None:  # the first alone: the others take its tokens
            return [self._one(wanted[0]), *(self.run(wanted[1:]) if wanted[1:] else [])]
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            return list(pool.map(self._one, wanted))

    def _one(self, wanted: Wanted) -> Outcome:
        name, method, rate, others, seed = wanted
        arguments = self.arguments
        rank = {"rank": arguments.rank} if name not in ("full", "gasare", "gosare") and arguments.rank else {}
        optimisation = {
            "steps": arguments.steps,
            "global_batch": arguments.batch,
            "learning_rate": rate,
            "seed": seed,
            "evaluate_every": arguments.steps,
            "evaluation_sequences": 256,
        }
        spec = TrainingSpec.model_validate(
            {
                "model": arguments.model,
                "dataset": {"source": "python-stdlib", "sequence_length": arguments.length},
                "method": method | rank,
                "optimisation": optimisation | ({"others_learning_rate": others} if others else {}),
                "deepspeed": {"zero_stage": 0},
                "checkpoints": {"every": arguments.steps},
            }
        )
        directory = self.directory / f"{name}-{rate:g}-{seed}"
        rundir = RunDir(directory)
        directory.mkdir()
        rundir.spec.write_text(spec.model_dump_json())
        if self.tokens is not None:
            shutil.copytree(self.tokens, rundir.data, copy_function=os.link)
        outcome = self._train(rundir, name, rate, seed)
        if self.tokens is None:
            self.tokens = self.directory / "tokens"
            shutil.copytree(rundir.data, self.tokens, copy_function=os.link)
        shutil.rmtree(directory)
        self.done += 1
        print(
            f"{self.done:4d}  {name:12s} η {rate:<8g} seed {seed:<5d} held-out {outcome.heldout:.4f}",
            file=sys.stderr,
            flush=True,
        )
        return outcome

    def _train(self, rundir: RunDir, name: str, rate: float, seed: int) -> Outcome:
        threads = max(1, (os.cpu_count() or 1) // self.arguments.jobs)
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "run", str(rundir.root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        found = list(events.read(rundir.events))
        failed = [e for e in found if isinstance(e, events.Failed)]
        if done.returncode != 0 and not any(e.reason == DivergenceError.name for e in failed):
            raise SystemExit(done.stdout[-4000:])
        started = next(e for e in found if isinstance(e, events.Started))
        losses = [e.loss for e in found if isinstance(e, events.Step)]
        evaluated = [e for e in found if isinstance(e, events.Evaluated) and e.step == self.arguments.steps]
        return Outcome(
            method=name,
            rate=rate,
            seed=seed,
            heldout=evaluated[-1].loss if evaluated else math.nan,
            training=statistics.fmean(losses[-20:]) if losses else math.nan,
            state_bytes=started.optimizer_state_bytes,
            trained_parameters=started.trained_parameters,
        )


def _after_the_losses(page: Path) -> str:
    """What the page has under a next heading: other benchmarks' results."""
    _, heading, rest = page.read_text().partition("\n# ") if page.exists() else ("", "", "")
    return heading + rest


def _page(arguments: argparse.Namespace, outcomes: list[Outcome], rates: dict[str, float]) -> str:
    full = {o.seed: o.heldout for o in outcomes if o.method == "full"}
    rows = [_row([o for o in outcomes if o.method == name], rates[name], full) for name in rates]
    shape = f"`{arguments.model}`, rank {arguments.rank or usual_rank(arguments.model)}, {arguments.steps} steps of "
    shape += f"{arguments.batch}×{arguments.length} bytes, τ {arguments.period}, seeds {arguments.seeds}"
    head = "| method | η | held-out loss | minus full, paired by seed | training loss | trained parameters | moments |"
    return "\n".join(
        [
            "# Losses of all methods at equal steps",
            "",
            f"Made by `{_command()}` on {machine()}.",
            "",
            __doc__.strip().split("\n\n", 1)[1] if __doc__ else "",
            "",
            f"{shape}. Losses are nats per byte, mean ± half the range over the seeds; training loss is the mean of "
            "the last 20 steps. η is the method's own rate (α is 1), tuned on "
            f"{', '.join(f'{rate:g}' for rate in arguments.rates)}; all else trains at {rates['full']:g}.",
            "",
            head,
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _row(runs: list[Outcome], rate: float, full: dict[int, float]) -> str:
    def spread(values: list[float], sign: str = "") -> str:
        return f"{statistics.fmean(values):{sign}.3f} ± {(max(values) - min(values)) / 2:.3f}"

    paired = spread([o.heldout - full[o.seed] for o in runs], "+")
    return (
        f"| {runs[0].method} | {rate:g} | {spread([o.heldout for o in runs])} | {paired} "
        f"| {spread([o.training for o in runs])} | {runs[0].trained_parameters / 1e6:.2f} M "
        f"| {runs[0].state_bytes / 1e6:.2f} MB |"
    )


def _command() -> str:
    return " ".join(["python -m benchmarks.pretrain", *sys.argv[1:]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain",
        description=__doc__,
        epilog="example: python -m benchmarks.pretrain --out docs/results.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(variants(1))
    parser.add_argument("--model", default="llama-1m", help="a preset")
    parser.add_argument("--methods", nargs="+", default=names, choices=names, help="full is always among them")
    parser.add_argument("--rank", type=int, help="default: the preset's")
    parser.add_argument("--period", type=int, default=25, help="steps between two subspaces; ReLoRA: twice as many")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--length", type=int, default=128, help="bytes in a sequence")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2], help="grid of the tuning"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--out", type=Path, help="write the page there")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
