"""The matrix: every method × engine × data type × number of ranks × accumulation × activation checkpointing.

A case is one point of it. `every_case` has all that a specification allows, `thinned` so few that still every two
values of different axes meet in one of them.
"""

import zlib
from dataclasses import astuple, dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import LlamaConfig

from tests.distributed.case import spec
from trainer.config import TrainingSpec

STEPS = 5
RANKED: dict[str, Any] = {"rank": 7}
PERIODIC: dict[str, Any] = {"rank": 7, "period": 2}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "galore": {"name": "galore"} | PERIODIC,
    "galore, randomised SVD": {"name": "galore", "svd": "randomized"} | PERIODIC,
    "galore, momentum SGD, carried": {"name": "galore", "optimizer": "msgd", "moments": "carried", "alpha": 50}
    | PERIODIC,
    "galore, large batch": {"name": "galore", "switch_batches": 2, "moments": "reset"} | PERIODIC,
    "golore": {"name": "golore", "random_fraction": 0.5} | PERIODIC,
    "galore_plus": {"name": "galore_plus", "residual_warmup": 2} | PERIODIC,
    "gasare": {"name": "gasare", "period": 2},
    "gosare": {"name": "gosare", "period": 2},
    "flora": {"name": "flora"} | PERIODIC,
    "garare": {"name": "garare"} | PERIODIC,
    "garare, pinv": {"name": "garare", "back_projection": "pinv"} | PERIODIC,
    "loro": {"name": "loro", "restart_warmup": 1} | PERIODIC,
    "loro, preconditioned": {"name": "loro", "between": "preconditioned", "restart_warmup": 1} | PERIODIC,
    "lowrank": {"name": "lowrank"} | RANKED,
    "lora": {"name": "lora"} | RANKED,
    "dora": {"name": "dora"} | RANKED,
    "relora": {"name": "relora", "prune": 0.5, "restart_warmup": 1} | PERIODIC,
    "sltrain": {"name": "sltrain"} | RANKED,
}
# In so small a model the product of two random factors is large, and so is its rounding; inverses multiply it.
RATES = {"lowrank": 0.001, "loro": 0.003, "loro, preconditioned": 0.003}
ENGINES: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3},
    "1, offload": {"zero_stage": 1, "offload": "cpu"},
    "2, offload": {"zero_stage": 2, "offload": "cpu"},
    "3, offload": {"zero_stage": 3, "offload": "cpu"},
    "3, offload all": {"zero_stage": 3, "offload": "cpu", "offload_parameters": "cpu"},
}
# Data type, how merges into frozen weights are rounded, and where that is not the default, when they are made.
TYPES = {
    "fp32": {"dtype": "fp32"},
    "fp32, factored": {"dtype": "fp32", "form": "factored"},
    "bf16": {"dtype": "bf16"},
    "bf16, merged": {"dtype": "bf16", "form": "merged"},
    "bf16, stochastic": {"dtype": "bf16", "merge": "stochastic"},
    "bf16, fp32 copy": {"dtype": "bf16", "merge": "fp32"},
}
# 20 and 35 divide by no power of two above 4; shards of most things need padding.
MODEL = {"hidden_size": 20, "intermediate_size": 35, "num_hidden_layers": 2, "num_attention_heads": 5}


@dataclass(frozen=True)
class Case:
    method: str
    engine: str
    type: str
    ranks: int
    accumulation: int
    recomputing: bool

    def __str__(self) -> str:
        recomputing = "-recomputing" if self.recomputing else ""
        return f"{self.method}-zero {self.engine}-{self.type}-{self.ranks}x{self.accumulation}{recomputing}"

    def spec(self, directory: Path) -> TrainingSpec:
        """Raises ValidationError where it is refused."""
        if not (directory / "model" / "config.json").exists():
            LlamaConfig(vocab_size=261, tie_word_embeddings=True, **MODEL).save_pretrained(directory / "model")
        return spec(
            directory,
            model={"path": str(directory / "model"), "weights": "random"},
            tokenizer="bytes",
            dataset={"sequence_length": 16, "validation_fraction": 0.002},
            method=METHODS[self.method],
            deepspeed=ENGINES[self.engine] | {"persistence_threshold": 0},
            optimisation=TYPES[self.type]
            | {
                "steps": STEPS,
                "global_batch": 12,
                "micro_batch": 12 // (self.ranks * self.accumulation),
                "learning_rate": RATES.get(self.method, 0.01),
                "warmup_steps": 1,
                "weight_decay": 0.1,
                "activation_checkpointing": self.recomputing,
            },
            resources={"processes": self.ranks},
        )


@cache
def every_case(directory: Path) -> tuple[list[Case], dict[Case, str]]:
    """(all cases that are accepted, why each of the others is refused)."""
    accepted, refused = [], {}
    for values in product(METHODS, ENGINES, TYPES, (1, 2, 3), (1, 2), (False, True)):
        case = Case(*values)
        if "," in case.type and (case.accumulation, case.recomputing) != (1, False):
            # Merging happens between steps and knows neither.
            continue
        try:
            case.spec(directory)
        except ValidationError as error:
            refused[case] = error.errors()[0]["msg"]
        else:
            accepted.append(case)
    return accepted, refused


def thinned(cases: list[Case]) -> list[Case]:
    """Taken one after the other, each time the case with the most pairs of values that no other has had yet; of equal
    ones rather one on few ranks, which is quicker, else any, so that no value comes with always the same others."""

    def pairs(case: Case) -> set[tuple[Any, ...]]:
        return set(combinations(enumerate(astuple(case)), 2))

    of = {case: pairs(case) for case in cases}
    missing = set().union(*of.values())
    chosen = []
    while missing:
        best = max(of, key=lambda case: (len(of[case] & missing), case.ranks < 3, zlib.crc32(str(case).encode())))
        chosen.append(best)
        missing -= of.pop(best)
    return chosen
