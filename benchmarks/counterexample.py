"""python -m benchmarks.counterexample: the problem on which GaLore stalls and GoLore does not, drawn as its Figure 1.

GoLore (He et al. 2024, arXiv:2410.11289), equation 1. X is n×n, n = 10, r = 4, k = n − r; one ξ = ±1 a step:

    f(X) = ½‖AX‖² + ⟨B, X⟩      G = AᵀAX + B + ξσC
    A = [I_k 0]   B = diag(D, 0)   C = diag(0, I_r)   D_ij ~ N(0, σ²)

The gradient's noise lives where f is flat. Once it is larger than the gradient, the top r singular vectors of G are the
noise's, and GaLore moves only where there is nothing to gain. Everything runs through the product's own methods, layers
and optimizer, in float64, without DeepSpeed.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.alone import alone
from trainer.batch import Batch
from trainer.config import TrainingSpec
from trainer.engine import PlainEngine
from trainer.methods import make_method
from trainer.schedule import learning_rate
from trainer.update import update
from trainer.zero import Shards

N, RANK, SIGMA, LARGE_BATCH = 10, 4, 1.0, 128
K = N - RANK

VARIANTS: dict[str, dict[str, Any]] = {
    "full parameters": {"name": "full"},
    "GaLore": {"name": "galore"},
    f"large-batch GaLore ({LARGE_BATCH})": {"name": "galore", "switch_batches": LARGE_BATCH},
    "GoLore@50%": {"name": "golore", "random_fraction": 0.5, "moments": "kept"},
    "GoLore@50% with momentum projection": {"name": "golore", "random_fraction": 0.5, "moments": "carried"},
}


@dataclass(frozen=True)
class Setting:
    """One panel: the optimizer inside the subspace, η, the period τ, steps, and whether B is there."""

    title: str
    optimizer: str
    learning_rate: float
    period: int
    steps: int
    with_b: bool = True


SETTINGS = {
    "adam": Setting("AdamW", "adamw", 1e-3, 100, 20_000),
    "msgd": Setting("momentum SGD", "msgd", 1e-2, 100, 20_000),
    "no-b": Setting("AdamW, B = 0", "adamw", 1e-2, 10, 1_000, with_b=False),
}


class Quadratic(nn.Module):
    """f and its noisy gradient as a model: called with ξ (batch, 1), it returns f + mean(ξ)·σ·⟨C, X⟩ as `.loss`."""

    def __init__(self, seed: int, with_b: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.D = torch.randn(K, K, generator=generator, dtype=torch.float64) * SIGMA * with_b
        self.X = nn.Linear(N, N, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.X.weight.zero_()
            self.X.weight[:K, :K] = 0.5 * SIGMA * torch.eye(K)
            self.X.weight[K:] = torch.randn(RANK, N, generator=generator, dtype=torch.float64) * SIGMA

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        x = self.X(torch.eye(N, dtype=torch.float64)).T
        noise = input_ids.double().mean() * SIGMA * x[K:, K:].diagonal().sum()
        return SimpleNamespace(loss=self.f(x) + noise)

    def f(self, x: Tensor) -> Tensor:
        return 0.5 * x[:K].square().sum() + (self.D * x[:K, :K]).sum()

    def least(self) -> float:
        """f* = −½‖D‖²."""
        return -0.5 * float(self.D.square().sum())


def spec_of(method: dict[str, Any], setting: Setting, seed: int) -> TrainingSpec:
    """The product's settings for a run. No model and no data of these names are ever looked for."""
    own = {"rank": RANK, "period": setting.period, "alpha": 1.0, "targets": ["X"]} if method["name"] != "full" else {}
    return TrainingSpec.model_validate(
        {
            "model": {"path": "counterexample", "weights": "random"},
            "dataset": "python-stdlib",
            "method": method | own | {"optimizer": setting.optimizer},
            "optimisation": {
                "steps": setting.steps,
                "global_batch": 1,
                "learning_rate": setting.learning_rate,
                "warmup_steps": 0,
                "final_rate_ratio": 1.0,
                "seed": seed,
            },
        }
    )


def descend(model: Any, spec: TrainingSpec, seed: int, record_every: int) -> Iterator[tuple[int, Tensor]]:
    """(step, X) at every `record_every`-th step of a run, the first and the last included."""
    method = make_method(spec)
    method.attach(model)
    engine = PlainEngine(spec, model, method)
    shards = Shards(engine)
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    steps = spec.optimisation.steps or 0
    for step in range(steps + 1):
        if step % record_every == 0 or step == steps:
            x = method.layers[0].effective(shards.read) if method.layers else model.X.weight
            yield step, x.detach().clone()
        if step < steps:
            draws = spec.batches_before(step + 1) - spec.batches_before(step)
            signs = torch.randint(2, (draws, 1), generator=generator) * 2 - 1
            update(engine, method, shards, step, learning_rate(step + 1, spec.optimisation), [Batch.of_tokens(signs)])


def curve(setting: Setting, variant: str, seed: int, record_every: int | None = None) -> list[tuple[int, float]]:
    """(step, f − f*) along one run."""
    model = Quadratic(seed, setting.with_b)
    spec = spec_of(VARIANTS[variant], setting, seed)
    every = record_every or max(1, setting.steps // 200)
    return [(step, float(model.f(x)) - model.least()) for step, x in descend(model, spec, seed, every)]


def main() -> None:
    arguments = _arguments()
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    with alone():
        for key in arguments.settings:
            for variant in VARIANTS:
                began = time.perf_counter()
                print(f"{SETTINGS[key].title}: {variant} …", end=" ", file=sys.stderr, flush=True)
                found.setdefault(key, {})[variant] = curve(SETTINGS[key], variant, arguments.seed)
                print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"seed": arguments.seed, "curves": found}))
    else:
        _print(found)
    if arguments.out:
        for path in draw(found, arguments.out):
            print(f"wrote {path}", file=sys.stderr)


def _print(found: dict[str, dict[str, list[tuple[int, float]]]]) -> None:
    print("f − f* at the end; and in the middle of the run\n")
    print("| | " + " | ".join(VARIANTS) + " |")
    print("|---|" + "---|" * len(VARIANTS))
    for key, curves in found.items():
        setting = SETTINGS[key]
        cells = [f"{points[-1][1]:.2g}; {points[len(points) // 2][1]:.2g}" for points in curves.values()]
        head = f"{setting.title}, η {setting.learning_rate:g}, τ {setting.period}, {setting.steps:,} steps"
        print(f"| {head} | " + " | ".join(cells) + " |")


def draw(found: dict[str, dict[str, list[tuple[int, float]]]], stem: Path) -> list[Path]:
    """A panel for each setting, as stem.png and stem.svg."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "stiefel"  # the same file for the same curves
    figure, axes = pyplot.subplots(1, len(found), figsize=(5.2 * len(found), 4.6), squeeze=False, layout="constrained")
    for axis, (key, curves) in zip(axes[0], found.items(), strict=True):
        for variant, points in curves.items():
            steps, gaps = zip(*points, strict=True)
            axis.semilogy(steps, gaps, label=variant, linewidth=1.5)
        # What full training reaches is float64's 0, and off the axis.
        axis.set(title=SETTINGS[key].title, xlabel="steps", ylabel="f − f*", ylim=(1e-9, None))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    pyplot.savefig(paths[0], dpi=150)
    pyplot.savefig(paths[1], metadata={"Date": None})
    return paths


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counterexample",
        description=__doc__,
        epilog="example: python -m benchmarks.counterexample --out docs/figures/counterexample",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--settings", nargs="+", default=["adam", "msgd"], choices=list(SETTINGS), help="panels to draw"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write FILE.png and FILE.svg; without it only the table is printed")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
