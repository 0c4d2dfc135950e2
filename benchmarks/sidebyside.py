"""The variants of `benchmarks.steps`: our engine with one of its methods, and what others have published."""

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from benchmarks.alone import alone  # first of all: it says what is logged where
from trainer.assemble import assemble
from trainer.batch import Batch
from trainer.config import TrainingSpec
from trainer.engine import build_engine
from trainer.methodconfig import METHOD_CONFIGS
from trainer.methods import make_method
from trainer.methods.loro import Loro
from trainer.model import build_model
from trainer.presets import LLAMA_TARGETS
from trainer.tokenizer import load_tokenizer
from trainer.train import distributed
from trainer.update import Update, update
from trainer.zero import Shards


class Stepper(Protocol):
    """A variant: `step` makes one update; `switch_seconds` is what a step takes more that changes subspaces, None where
    there are none."""

    def step(self, batches: list[Batch]) -> None: ...
    def switch_seconds(self, batches: list[Batch]) -> float | None: ...


# No change of subspace happens by itself.
_NEVER = 10**9
_RATE = 1e-4


def measure(arguments: Any) -> dict[str, dict[str, Any]]:
    """Seconds of each variant's steps and switches; on all ranks alike, since a step ends when the last has ended."""
    with distributed() if "RANK" in os.environ else alone():
        return _measured(arguments)


def _measured(arguments: Any) -> dict[str, dict[str, Any]]:
    steppers = {name: stepper_of(name, arguments) for name in arguments.variants}
    found: dict[str, dict[str, Any]] = {name: {"steps": [], "switches": []} for name in steppers}
    generator = torch.Generator().manual_seed(dist.get_rank())
    for index in range(arguments.rounds + 1):
        size = (arguments.batch, arguments.length)
        batches = [Batch.of_tokens(torch.randint(257, size, generator=generator).to(_device()))]
        for name, stepper in steppers.items():
            if index <= arguments.switches:
                seconds = stepper.switch_seconds(batches)
                if seconds is not None and index > 0:
                    found[name]["switches"].append(seconds)
            seconds = timed(partial(stepper.step, batches))
            if index > 0:  # the first warms up
                found[name]["steps"].append(seconds)
        if dist.get_rank() == 0:
            print(f"[{index}/{arguments.rounds}]", file=sys.stderr, flush=True)
    return found


def stepper_of(name: str, arguments: Any) -> Stepper:
    if name.startswith("package:"):
        return PACKAGES[name.removeprefix("package:")](arguments)
    return Ours(spec_of(name, arguments))


def spec_of(name: str, arguments: Any) -> TrainingSpec:
    """METHOD[:field=value,…]."""
    method, _, settings = name.partition(":")
    config: dict[str, Any] = {"name": method}
    optimisation: dict[str, Any] = {}
    fields = METHOD_CONFIGS[method].model_fields
    config |= {"rank": arguments.rank} if "rank" in fields else {}
    config |= {"period": _NEVER} if "period" in fields else {}
    config |= {"svd": "randomized"} if "svd" in fields else {}
    config |= {"alpha": arguments.rank} if method in ("lora", "dora") else {}
    for setting in filter(None, settings.split(",")):
        field, _, text = setting.partition("=")
        part, key = (optimisation, field.partition(".")[2]) if field.startswith("optimisation.") else (config, field)
        part[key] = _value(text)
    ranks = dist.get_world_size()
    return TrainingSpec.model_validate(
        {
            "model": {"preset": arguments.model, "vocabulary": arguments.vocabulary},
            "dataset": {"source": "python-stdlib", "sequence_length": arguments.length},
            "method": config,
            "optimisation": {
                "steps": _NEVER,
                "global_batch": arguments.batch * ranks,
                "learning_rate": _RATE,
                "warmup_steps": 0,
                "dtype": arguments.dtype,
            }
            | optimisation,
            "deepspeed": {"zero_stage": arguments.stage},
            "resources": {"processes": ranks},
        }
    )


def _value(text: str) -> Any:
    return TypeAdapter(int | float | str).validate_strings(text)


class Ours:
    """The trainer's own step, from the engine on; nothing is read, evaluated or saved."""

    def __init__(self, spec: TrainingSpec) -> None:
        self.method = make_method(spec)
        model, _ = assemble(spec, load_tokenizer(spec.tokenizer), self.method)
        self.engine = build_engine(spec, model.to(_device()), self.method)
        self.shards = Shards(self.engine)
        self.method.keep_masters(self.shards)
        self.engine.module.train()
        self.done = 0

    def step(self, batches: list[Batch]) -> None:
        self.done += 1
        update(self.engine, self.method, self.shards, self.done, _RATE, batches)

    def switch_seconds(self, batches: list[Batch]) -> float | None:
        """LORO's comes after a step, all others before."""
        step = _NEVER - 1 if isinstance(self.method, Loro) else 0
        made: list[Update] = []
        with_switch = timed(lambda: made.append(update(self.engine, self.method, self.shards, step, _RATE, batches)))
        return with_switch - timed(partial(self.step, batches)) if made[0].reports else None


class Plain(ABC):
    """A loop without an engine, as a package's own examples have it."""

    def __init__(self, arguments: Any) -> None:
        if dist.get_world_size() > 1:
            raise SystemExit("package: variants run on one rank; leave --ranks out")
        spec = spec_of("full", arguments)
        self.model = build_model(spec, load_tokenizer(spec.tokenizer)).to(_device()).train()
        self.rank = arguments.rank
        self.optimizer = self.make()

    @abstractmethod
    def make(self) -> torch.optim.Optimizer:
        """The package's, for `self.model`, which it may change."""

    def step(self, batches: list[Batch]) -> None:
        for batch in batches:
            self.model(**batch.inputs).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def switch_seconds(self, batches: list[Batch]) -> float | None:
        return None


class TorchAdamW(Plain):
    def make(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=_RATE)


class GaLoreTorch(Plain):
    """GaLoreAdamW, square matrices on the left as ours are."""

    def make(self) -> torch.optim.Optimizer:
        try:
            from galore_torch import GaLoreAdamW
        except ImportError as error:
            raise SystemExit(f"package:galore-torch: {error}; pip install 'stiefel[peers]'") from error

        targets = [p.weight for name, p in self.model.named_modules() if name.rpartition(".")[2] in LLAMA_TARGETS]
        taken = {id(p) for p in targets}
        others = [p for p in self.model.parameters() if id(p) not in taken]
        common = {"rank": self.rank, "update_proj_gap": _NEVER, "scale": 0.25}
        left = [p for p in targets if p.shape[0] == p.shape[1]]
        rest = [p for p in targets if p.shape[0] != p.shape[1]]
        groups = [
            {"params": others},
            {"params": left, "proj_type": "reverse_std"} | common,
            {"params": rest, "proj_type": "std"} | common,
        ]
        return GaLoreAdamW(groups, lr=_RATE, no_deprecation_warning=True)

    def switch_seconds(self, batches: list[Batch]) -> float | None:
        """What a step takes more in which every basis is made anew."""
        for state in self.optimizer.state.values():
            if "projector" in state:
                state["projector"].update_proj_gap = 1
        for batch in batches:
            self.model(**batch.inputs).loss.backward()
        with_switch = timed(self.optimizer.step)
        for state in self.optimizer.state.values():
            if "projector" in state:
                state["projector"].update_proj_gap = _NEVER
        without = timed(self.optimizer.step)
        self.optimizer.zero_grad()
        return with_switch - without


class Peft(Plain):
    dora = False

    def make(self) -> torch.optim.Optimizer:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank, lora_alpha=self.rank, target_modules=list(LLAMA_TARGETS), use_dora=self.dora, lora_dropout=0.0
        )
        others = [p for name, p in self.model.named_parameters() if not any(target in name for target in LLAMA_TARGETS)]
        self.model = get_peft_model(self.model, config)
        for parameter in others:
            # As ours: what the method does not replace is trained.
            parameter.requires_grad_(True)
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=_RATE)


class PeftDora(Peft):
    dora = True


PACKAGES: dict[str, Callable[[Any], Plain]] = {
    "torch-adamw": TorchAdamW,
    "galore-torch": GaLoreTorch,
    "peft-lora": Peft,
    "peft-dora": PeftDora,
}


def timed(do: Callable[[], None]) -> float:
    """Seconds until the last kernel has ended."""
    began = time.perf_counter()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def device_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
