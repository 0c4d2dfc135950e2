"""The product's own random numbers as `Draws`, and the product's trajectory beside the reference's.

What a basis is made from is compared on the same draws; what is made of them each side computes by itself.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.loop import train
from tests.reference.rules import RULES, Problem, Rule
from trainer.batch import Batch
from trainer.config import TrainingSpec
from trainer.engine import PlainEngine
from trainer.lowrank.philox import gaussian
from trainer.lowrank.switch import generator_for
from trainer.methods import make_method
from trainer.methods.base import Method
from trainer.modelconfig import starts_from_weights
from trainer.presets import head_size_of
from trainer.schedule import learning_rate
from trainer.update import update
from trainer.zero import Shards


class ProductDraws:
    """For the `index`-th layer of a run; `start` has what the layer began with."""

    def __init__(self, spec: TrainingSpec, index: int, shape: tuple[int, int], heads: int, start: dict[str, Tensor]):
        self.method: Any = spec.method
        self.seed, self.index, self.shape, self.head_count = spec.optimisation.seed, index, shape, heads
        self.start = start

    def generator(self, step: int) -> torch.Generator:
        return generator_for(self.seed, step, self.index)

    def gaussian(self, step: int, rows: int, rank: int) -> Tensor:
        if self.method.name == "golore":
            return torch.randn(rows, rank, generator=self.generator(step))
        scale = self.shape[0] ** -0.5 if self.method.name == "garare" else rank**-0.5
        epoch = step // self.method.period + 1
        return gaussian(rows, rank, self.seed, self.index, epoch, torch.device("cpu")) * scale

    def sketch(self, step: int, columns: int, width: int) -> Tensor:
        generator = self.generator(step)
        if self.head_count:  # the heads are drawn first
            torch.randperm(self.head_count, generator=generator)
        return torch.randn(columns, width, generator=generator)

    def subset(self, step: int) -> Tensor:
        total = self.shape[0] * self.shape[1]
        count = max(1, int(self.method.density * total))
        return torch.randperm(total, generator=self.generator(step))[:count].sort().values

    def heads(self, step: int, count: int) -> list[int]:
        drawn: list[int] = torch.randperm(self.head_count, generator=self.generator(step))[:count].tolist()
        return drawn

    def initial(self, name: str) -> Tensor:
        return self.start[name]

    def restart(self, step: int) -> Tensor:
        r, n = self.method.rank, self.shape[1]
        return (torch.rand(r, n, generator=self.generator(step)) * 2 - 1) * n**-0.5

    def kept(self, step: int, name: str, moment: str) -> Tensor:
        (m, n), r, generator = self.shape, self.method.rank, self.generator(step)
        torch.rand(r, n, generator=generator)  # the new A
        masks = {"B": torch.rand(m, r, generator=generator), "A": torch.rand(r, n, generator=generator)}
        return masks[name] >= self.method.prune


def start_of(layer: nn.Module) -> dict[str, Tensor]:
    """B, A, positions, values, as far as the layer has them."""
    named = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    return {name: named[name].detach().clone() for name in ("B", "A", "positions", "values") if name in named}


def reference_rules(spec: TrainingSpec, model: nn.Module) -> tuple[dict[str, Rule], Problem]:
    """A rule for every target of a plain model, and what the loop needs for all other parameters."""
    method: Any = spec.method
    optimisation = spec.optimisation
    facts: dict[str, Any] = {
        "settings": method,
        "betas": optimisation.betas,
        "epsilon": optimisation.epsilon,
        "decay": optimisation.weight_decay,
        "steps": optimisation.steps,
        "hidden": getattr(getattr(model, "config", None), "hidden_size", 0),
        "frozen": starts_from_weights(spec.model),
    }
    if method.name == "full":
        matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
        rule = RULES["full"]
        return {n: rule(p, Problem(heads=0, **facts), None) for n, p in matrices.items()}, Problem(heads=0, **facts)
    changed = copy.deepcopy(model)
    attached = make_method(spec)
    attached.attach(changed)
    rules = {}
    head_size = head_size_of(getattr(model, "config", None)) or 0
    for index, layer in enumerate(attached.layers):
        has_heads = method.name == "galore_plus" and layer.name.split(".")[-1] in method.head_targets
        heads = layer.rows // head_size if has_heads else 0
        draws = ProductDraws(spec, index, layer.shape, heads, start_of(layer))
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        rules[f"{layer.name}.weight"] = RULES[method.name](weight, Problem(heads=heads, **facts), draws)
    return rules, Problem(heads=0, **facts)


def reference_run(spec: TrainingSpec, model: nn.Module, batches: list[Tensor]) -> tuple[dict[str, Tensor], list[float]]:
    """(weights at the end, losses) of the reference, on a copy of the plain `model`; one tensor of tokens a step."""
    model = copy.deepcopy(model)
    rules, problem = reference_rules(spec, model)
    losses = train(spec.optimisation, model, batches, rules, problem)
    return {name: p.detach() for name, p in model.named_parameters()}, losses


def product_run(
    spec: TrainingSpec, model: nn.Module, batches: list[list[Tensor]]
) -> tuple[dict[str, Tensor], list[float], Method, Shards]:
    """The same of the product's method code in a plain engine; the micro-batches of each step."""
    model = copy.deepcopy(model)
    method = make_method(spec)
    method.attach(model)
    engine = PlainEngine(spec, model, method)
    shards = Shards(engine)
    losses = []
    for step, micro_batches in enumerate(batches):
        rate = learning_rate(step + 1, spec.optimisation)
        losses.append(update(engine, method, shards, step, rate, batches_of(micro_batches)).loss)
    return effective_weights(model, method, shards), losses, method, shards


def batches_of(micro_batches: list[Tensor]) -> list[Batch]:
    return [Batch.of_tokens(tokens) for tokens in micro_batches]


def effective_weights(model: nn.Module, method: Method, shards: Shards) -> dict[str, Tensor]:
    """Every parameter of the plain model, whole: W_eff for what the method has replaced. Collective."""
    inside = {id(p) for layer in method.layers for p in layer.parameters()}
    weights = {name: shards.read(p) for name, p in model.named_parameters() if id(p) not in inside}
    for layer in method.layers:
        weights[f"{layer.name}.weight"] = layer.effective(shards.read).detach()
        if layer.bias is not None:
            weights[f"{layer.name}.bias"] = shards.read(layer.bias)
    return weights
