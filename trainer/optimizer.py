"""The optimizer inside the engine: rules that treat every element alike, so that a shard is updated as the whole is.

    adamw      M ← β₁M + (1−β₁)G   V ← β₂V + (1−β₂)G²   θ ← (1 − ηλ)θ − η·M̂/(√V̂ + ε)        torch's own AdamW
    msgd       M ← β₁M + (1−β₁)G                         θ ← (1 − ηλ)θ − η·M
    moments    M, V as in adamw                          θ stays
    gradient                                             θ ← G

With `moments` the method makes the step itself, from the direction that follows from the moments (LORO's exact step).
`gradient` is a gradient that a method wants to see after DeepSpeed has reduced and clipped it. A group's rule may
change between steps, as long as its moments stay the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "msgd": ("exp_avg",),
    "moments": ("exp_avg", "exp_avg_sq"),
    "gradient": (),
}


def direction(first: Tensor, second: Tensor, count: int, betas: tuple[float, float], epsilon: float) -> Tensor:
    """Adam's M̂/(√V̂ + ε), from moments after `count` updates."""
    root = (second / (1 - betas[1] ** count)).sqrt_().add_(epsilon)
    return first / (1 - betas[0] ** count) / root


class Rules(torch.optim.Optimizer):
    """Parameter groups with `name`, `rule` and `rate` (η's multiple, for the loop), beside torch's own keys."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": epsilon})
        # Taken here, because DeepSpeed replaces the groups' parameters with flat shards.
        self.group_of: dict[Tensor, str] = {p: group["name"] for group in groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch's returns a loss
        for group in self.param_groups:
            tensors = [p for p in group["params"] if p.grad is not None]
            if tensors:
                _RULES[group["rule"]](group, tensors, [self._state_of(p, group["rule"]) for p in tensors])

    def create_state(self, parameter: Tensor, rule: str) -> None:
        """What the first step would create: moments and count, all 0."""
        self.state[parameter] = {
            # Beside the moments, where the fused kernel wants it.
            "step": torch.zeros((), device=parameter.device),
            **{key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS[rule]},
        }

    def _state_of(self, parameter: Tensor, rule: str) -> dict[str, Tensor]:
        if parameter not in self.state:
            self.create_state(parameter, rule)
        state: dict[str, Tensor] = self.state[parameter]
        return state


def _adamw(group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    # The fused kernel walks through memory, and does not look whether all have the same order in it.
    assert all(_order(p) == _order(g) for p, g in zip(parameters, gradients, strict=True))
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        # One pass over the memory instead of a dozen.
        fused=True,
        foreach=False,
    )


def _order(tensor: Tensor) -> list[int]:
    """In which its elements lie in memory. The stride of a dimension of size 1 may be anything."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _msgd(group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    for parameter, state in zip(parameters, states, strict=True):
        assert parameter.grad is not None
        state["step"] += 1
        state["exp_avg"].lerp_(parameter.grad, 1 - group["betas"][0])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * state["exp_avg"])


def _moments(group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    _adamw(group | {"lr": 0.0, "weight_decay": 0.0}, parameters, states)


def _gradient(group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.copy_(parameter.grad)


_RULES = {"adamw": _adamw, "msgd": _msgd, "moments": _moments, "gradient": _gradient}
