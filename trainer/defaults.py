"""What a run is given where its request says nothing: by method, by task, by the papers. Imports no torch.

From random weights, and in pre-training, a method's own defaults hold (`trainer.methodconfig`). Pretrained weights are
fine-tuned with other ones: smaller rates, smaller ranks, and other scales. Each row says which table, section or script
of the authors its figures were compared with; [choice] is ours, where none has the method, or that figure.

Where two sources differ, and what no table says:

- GaLore's and GoLore's rates are those with which GoLore's table 4 compares the two. GaLore's own table 7 has the same
  rank and α, but 3e-5 for CoLA and MRPC and 1e-5 for the rest; τ is in its repository's GLUE example, not in the table.
- LoRA's table 9 has α 8 for RoBERTa-base, its authors' scripts α 16 at the same rates; the table's is here. They adapt
  queries and values alone, and begin MRPC, RTE and STS-B from MNLI's adapter, which no default does here.
- The papers have rates task by task. One for any other data set is ours, in or between them.

A default never makes a run of ten steps or more impossible: a period that is longer than the run is shortened so that
the run reaches its first change. What was given is never touched; `trainer.methodcheck` refuses it where it makes no
sense.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer import methodconfig as methods
from trainer.presets import ALL_LINEAR

Task = Literal["pretrain", "finetune", "classify"]


@dataclass(frozen=True)
class Row:
    """`rate` is η. `by_glue`: (η, settings) of single GLUE tasks, where a paper tells them apart."""

    rate: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    by_glue: Mapping[str, tuple[float, Mapping[str, Any]]] = field(default_factory=dict)

    def of(self, glue: str | None) -> tuple[float, Mapping[str, Any]]:
        """(η, settings)."""
        rate, more = self.by_glue.get(glue or "", (self.rate, {}))
        return rate, {**self.settings, **more}


_GALORE_GLUE = {"rank": 4, "alpha": 4.0, "period": 500}
_GALORE = "GoLore (arXiv:2410.11289) table 4, both methods, RoBERTa-base on GLUE; η elsewhere [choice]"
_GOLORE_RATES = {
    "cola": 2.5e-5,
    "stsb": 2e-5,
    "mrpc": 3.5e-5,
    "rte": 7e-6,
    "sst2": 1e-5,
    "mnli": 1e-5,
    "qnli": 1e-5,
    "qqp": 1e-5,
}
_AS_GALORE: dict[str, tuple[float, Mapping[str, Any]]] = {task: (rate, {}) for task, rate in _GOLORE_RATES.items()}
_LORA_RATES = {
    "cola": 4e-4,
    "stsb": 4e-4,
    "mrpc": 4e-4,
    "rte": 5e-4,
    "sst2": 5e-4,
    "mnli": 5e-4,
    "qnli": 4e-4,
    "qqp": 5e-4,
}
_AS_LORA: dict[str, tuple[float, Mapping[str, Any]]] = {task: (rate, {}) for task, rate in _LORA_RATES.items()}
_LORA = {"rank": 8, "alpha": 8.0}
_LORA_SOURCE = "LoRA (arXiv:2106.09685) table 9, RoBERTa-base on GLUE; η elsewhere [choice]"


def _loro(rate: float, scale: float, period: int) -> tuple[float, Mapping[str, Any]]:
    return rate, {"scale": scale, "period": period}


CLASSIFY: dict[str, Row] = {
    "full": Row(2e-5, source="[choice] of 1e-5, 2e-5, 3e-5: RoBERTa (arXiv:1907.11692) section 5.1, large, on GLUE"),
    "galore": Row(2e-5, _GALORE_GLUE, _GALORE, _AS_GALORE),
    "golore": Row(2e-5, _GALORE_GLUE, _GALORE, _AS_GALORE),
    "galore_plus": Row(2e-5, _GALORE_GLUE, "[choice] as galore: its paper has no GLUE", _AS_GALORE),
    "garare": Row(2e-5, _GALORE_GLUE, "[choice] as galore, whose settings its authors follow", _AS_GALORE),
    "flora": Row(2e-5, {"rank": 4, "alpha": 1.0}, "[choice] a Gaussian basis of variance 1/r scales by itself"),
    "gasare": Row(2e-5, {"period": 500}, "[choice] full's rate, galore's period"),
    "gosare": Row(2e-5, {"period": 500}, "[choice] full's rate, galore's period"),
    "loro": Row(
        4e-4,
        {"rank": 4, "scale": 8.0, "period": 100},
        "LORO (ICLR 2025) table 8, rank 4, RoBERTa-base on GLUE; elsewhere [choice] as QNLI",
        {
            "cola": _loro(4e-4, 32.0, 100),
            "stsb": _loro(4e-4, 8.0, 200),
            "mrpc": _loro(2e-4, 32.0, 100),
            "rte": _loro(5e-4, 8.0, 100),
            "sst2": _loro(5e-5, 8.0, 100),
            "mnli": _loro(5e-5, 8.0, 100),
            "qnli": _loro(4e-4, 8.0, 100),
            "qqp": _loro(5e-5, 8.0, 100),
        },
    ),
    "lora": Row(4e-4, _LORA, _LORA_SOURCE, _AS_LORA),
    "dora": Row(4e-4, _LORA, "[choice] as lora", _AS_LORA),
    "relora": Row(4e-4, _LORA, "[choice] as lora", _AS_LORA),
}

_GOLORE_LLAMA = {"rank": 128, "alpha": 4.0, "period": 500}
_GOLORE_LLAMA_SOURCE = "GoLore (arXiv:2410.11289) on LLaMA2-7B, WinoGrande and BoolQ; r [choice], there 1024"
_LORA_LLAMA = {"rank": 32, "alpha": 32.0}
FINETUNE: dict[str, Row] = {
    "full": Row(2e-5, source="Llama 2 (arXiv:2307.09288) section 3.1, supervised fine-tuning"),
    "galore": Row(1e-4, _GOLORE_LLAMA, _GOLORE_LLAMA_SOURCE),
    "golore": Row(1e-4, _GOLORE_LLAMA, _GOLORE_LLAMA_SOURCE),
    "galore_plus": Row(
        1e-6,
        {"rank": 128, "alpha": 64.0, "period": 500},
        "GaLore+ (arXiv:2412.19820) table 5, LLaMA2-7B on GSM8K at r 128, one of its three; τ [choice]",
    ),
    "garare": Row(1e-4, _GOLORE_LLAMA, "[choice] as galore"),
    "flora": Row(2e-5, {"rank": 128, "alpha": 1.0}, "[choice] as for classify"),
    "gasare": Row(2e-5, {"period": 500}, "[choice] full's rate, galore's period"),
    "gosare": Row(2e-5, {"period": 500}, "[choice] full's rate, galore's period"),
    "loro": Row(4e-4, {"rank": 32, "scale": 8.0, "period": 100}, "[choice] LORO's GLUE settings at lora's rank"),
    "lora": Row(
        2e-4,
        _LORA_LLAMA,
        "η: QLoRA's authors' scripts (7B, 13B; 1e-4 above), LoRA tables 11 and 12; r, α [choice], QLoRA has 64, 16",
    ),
    "dora": Row(2e-4, {"rank": 32, "alpha": 64.0}, "DoRA (arXiv:2402.09353) table 8, LLaMA2-7B, commonsense reasoning"),
    "relora": Row(2e-4, _LORA_LLAMA, "[choice] as lora"),
}

ROWS: dict[Task, dict[str, Row]] = {"pretrain": {}, "finetune": FINETUNE, "classify": CLASSIFY}


def learning_rate(
    method: methods.MethodConfig, task: Task, glue: str | None, preset: str | None, pretrained: bool
) -> float:
    """η where the request names none."""
    row = ROWS[task].get(method.name) if pretrained else None
    if row is None:
        return method.learning_rate(preset)
    return row.of(glue)[0]


def with_defaults(
    method: methods.MethodConfig, task: Task, glue: str | None, preset: str | None, pretrained: bool, steps: int
) -> methods.MethodConfig:
    """With every setting that was not given, in a run of so many steps."""
    found: dict[str, Any] = {}
    row = ROWS[task].get(method.name) if pretrained else None
    if row is not None:
        found |= row.of(glue)[1]
        found |= _within(method, found, steps)
    if task != "pretrain" and preset is None and isinstance(method, methods.TargetedSettings):
        found["targets"] = (ALL_LINEAR,)
    ours = {name: value for name, value in found.items() if not _is_given(method, name)}
    return method.model_copy(update=ours).resolved(preset)


def _within(method: methods.MethodConfig, found: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Periods and warm-ups that a run of `steps` has room for: the row's, or the method's, or the longest possible."""

    def of(name: str, default: Any = None) -> Any:
        own = getattr(method, name)
        return own if _is_given(method, name) else found.get(name, own) if default is None else default

    match method:
        case methods.LoroConfig():
            period = min(of("period"), steps)
            return {"period": period, "restart_warmup": min(method.restart_warmup, of("period", period))}
        case methods.ReloraConfig():
            period = min(method.period, max(1, math.ceil(steps / 2)))
            return {"period": period, "restart_warmup": min(method.restart_warmup, of("period", period))}
        case methods.GoLoreConfig():
            # The first switch that samples comes with the random share of the steps, not after the run.
            first, period = method.first_random_step(steps), of("period")
            reached = first == 0 or math.ceil(first / period) * period < steps
            return {} if reached else {"period": first}
        case methods.GaLorePlusConfig():
            return {"residual_warmup": min(method.residual_warmup, max(1, steps // 10))}
        case _:
            return {}


def _is_given(method: methods.MethodConfig, name: str) -> bool:
    """A null is none."""
    return name in method.model_fields_set and getattr(method, name) is not None
