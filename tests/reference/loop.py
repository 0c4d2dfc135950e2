"""A whole training run with reference rules: one process, one full gradient a step, nothing fused, no clipping."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.adam import Moments
from tests.reference.rule import Problem, Rule
from tests.reference.rules import rate_factor
from trainer.schedule import learning_rate


def train(
    optimisation: Any, model: nn.Module, batches: Iterable[Tensor], rules: Mapping[str, Rule], problem: Problem
) -> list[float]:
    """The loss of each step, taken before its update; `model` has the trained weights at the end.

    `rules` by parameter name, for the matrices of the method. Every other parameter has AdamW at the same η with β, ε
    and λ of `problem`; λ only where there are two dimensions or more. One batch of tokens a step.
    """
    parameters = dict(model.named_parameters())
    others = {name: Moments(p.detach(), problem) for name, p in parameters.items() if name not in rules}
    place(parameters, rules)
    losses = []
    for step, tokens in enumerate(batches):
        eta = learning_rate(step + 1, optimisation) * rate_factor(problem.settings, step)
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        for name, rule in rules.items():
            rule.update(parameters[name].grad, eta, step)
        place(parameters, rules)
        for name, moments in others.items():
            if parameters[name].grad is not None:
                decoupled(parameters[name], moments, eta, problem.decay)
    model.zero_grad(set_to_none=True)
    return losses


@torch.no_grad()
def place(parameters: Mapping[str, nn.Parameter], rules: Mapping[str, Rule]) -> None:
    for name, rule in rules.items():
        parameters[name].copy_(rule.weight)


@torch.no_grad()
def decoupled(parameter: nn.Parameter, moments: Moments, eta: float, decay: float) -> None:
    keep = 1 - eta * decay if parameter.ndim >= 2 else 1.0
    parameter.copy_(keep * parameter - eta * moments.direction(parameter.grad))
