"""A reference rule tried alone: its random numbers, each a function of the question, and a small noisy quadratic."""

import zlib
from typing import Any

import torch
from torch import Tensor

from tests.reference.rules import RULES, Problem, Rule
from trainer.methodconfig import METHOD_CONFIGS

SHAPES = [(6, 9), (8, 5), (6, 6)]
STEPS, ETA = 12, 0.05


def generator(*key: Any) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def gaussian(*key: Any, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator(*key), dtype=torch.float64)


class SeededDraws:
    """`Draws` for an m×n weight under `settings`, which it reads for r and the densities."""

    def __init__(self, m: int, n: int, settings: Any, count_heads: int = 0) -> None:
        self.m, self.n, self.settings, self.count_heads = m, n, settings, count_heads
        self.r = getattr(settings, "rank", None)

    def gaussian(self, step: int, rows: int, rank: int) -> Tensor:
        return gaussian("gaussian", step, shape=(rows, rank)) / rank**0.5

    def sketch(self, step: int, columns: int, width: int) -> Tensor:
        return gaussian("sketch", step, shape=(columns, width))

    def subset(self, step: int) -> Tensor:
        count = max(1, int(self.settings.density * self.m * self.n))
        return torch.randperm(self.m * self.n, generator=generator("subset", step))[:count].sort().values

    def heads(self, step: int, count: int) -> list[int]:
        return torch.randperm(self.count_heads, generator=generator("heads", step))[:count].tolist()

    def initial(self, name: str) -> Tensor:
        if name == "positions":
            return self.subset(-1)
        if name == "values":
            return gaussian(name, shape=(len(self.subset(-1)),))
        return gaussian(name, shape=(self.m, self.r) if name == "B" else (self.r, self.n)) / 2

    def restart(self, step: int) -> Tensor:
        return gaussian("restart", step, shape=(self.r, self.n))

    def kept(self, step: int, name: str, moment: str) -> Tensor:
        # Every second moment is kept: an entry of A that loses only that one takes a step of M̂/ε at the restart.
        shape = (self.m, self.r) if name == "B" else (self.r, self.n)
        return (gaussian("kept", step, name, shape=shape) > 0) | torch.tensor(moment == "v")


def rule_for(
    name: str, shape: tuple[int, int], *, heads: int = 0, problem: dict[str, Any] | None = None, **given: Any
) -> Rule:
    """`given` are settings, `problem` what else the rule is told differently."""
    fields = METHOD_CONFIGS[name].model_fields
    small = {"rank": 3, "period": 4, "density": 0.4, "restart_warmup": 2, "residual_warmup": 3}
    settings = METHOD_CONFIGS[name](**{k: v for k, v in small.items() if k in fields} | given)
    facts = {"betas": (0.9, 0.99), "epsilon": 1e-8, "decay": 0.1, "steps": STEPS, "hidden": 16, "heads": heads}
    draws = SeededDraws(*shape, settings, heads)
    return RULES[name](gaussian("weight", shape=shape), Problem(settings=settings, **facts | (problem or {})), draws)


def gradient_at(W: Tensor, step: int) -> Tensor:
    """Of a quadratic, ½‖C(W − T)‖², plus noise that is the same for whoever asks at this step."""
    m, n = W.shape
    C = gaussian("curvature", shape=(m, m)) / 3
    return C.T @ C @ (W - gaussian("target", shape=(m, n))) + gaussian("noise", step, shape=(m, n)) / 4


def path(rule: Rule, steps: int = STEPS) -> list[Tensor]:
    weights = [rule.weight]
    for step in range(steps):
        rule.update(gradient_at(rule.weight, step), ETA, step)
        weights.append(rule.weight)
    return weights


def assert_same_path(one: Rule, other: Rule, steps: int = STEPS, rtol: float = 1e-9) -> None:
    for a, b in zip(path(one, steps), path(other, steps), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
