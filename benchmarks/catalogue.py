"""What docs/performance.md shows: each measurement's name, its module in this package, and how it is called."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """`name` is that of benchmarks/results/NAME.json, and of the place in docs/performance.md. The module has a
    `markdown` that makes a table of what it prints with --json. `lacks`: what was not at hand to measure it."""

    name: str
    module: str
    arguments: str = ""
    lacks: str = ""

    @property
    def command(self) -> str:
        return f"python -m benchmarks.{self.module} {self.arguments}".rstrip()

    def markdown(self, result: dict[str, Any]) -> str:
        make: Callable[[dict[str, Any]], str] = import_module(f"benchmarks.{self.module}").markdown
        return make(result)


_TWO_RANKS = "--ranks 2 --stage 2 --length 64 --rounds 15 --switches 0"
MEASUREMENTS = (
    Measurement(
        "one-rank",
        "steps",
        "--rounds 15 --switches 5 --variants full galore galore:optimisation.form=factored galore:rank=64 "
        "package:galore-torch package:torch-adamw",
    ),
    Measurement(
        "factors",
        "steps",
        "--rounds 15 --switches 3 --variants full loro lora package:peft-lora dora package:peft-dora",
    ),
    Measurement("two-ranks-fp32", "steps", f"{_TWO_RANKS} --variants full galore galore:optimisation.form=factored"),
    Measurement(
        "two-ranks-bf16",
        "steps",
        f"{_TWO_RANKS} --dtype bf16 --variants full galore galore:optimisation.form=merged",
    ),
    Measurement("shares", "shares", "--variants full galore galore:rank=64 loro lora"),
    Measurement(
        "shares-two-ranks",
        "shares",
        "--ranks 2 --stage 2 --length 64 --dtype bf16 --variants full galore galore:optimisation.form=merged",
    ),
    Measurement("precision", "precision"),
    Measurement("peak-memory", "peak"),
    Measurement("supervised", "supervised"),
    Measurement("start-up", "startup"),
    Measurement("requests", "requests"),
    Measurement("ingest", "ingest", "--rate 10000"),
    Measurement("gpu", "gpu", lacks="No GPU was at hand"),
)
BY_NAME = {measurement.name: measurement for measurement in MEASUREMENTS}
