"""The rules by themselves, on whole tensors; inside the engine they are tested with the methods."""

import pytest
import torch
from torch import Tensor

from trainer.optimizer import Rules

BETAS, EPSILON = (0.9, 0.999), 1e-8


def _stepped(parameter: Tensor, gradients: list[Tensor]) -> Tensor:
    group = {"params": [parameter], "name": "all", "rule": "adamw", "rate": 1.0, "lr": 0.1, "weight_decay": 0.01}
    optimizer = Rules([group], BETAS, EPSILON)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter


def test_adamw_is_the_written_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    found = _stepped(start.clone(), gradients)
    first, second, weight = torch.zeros_like(start), torch.zeros_like(start), start.clone()
    for t, gradient in enumerate(gradients, start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + EPSILON)
        weight = (1 - 0.1 * 0.01) * weight - 0.1 * update
    torch.testing.assert_close(found, weight, atol=1e-12, rtol=0)


def test_the_stride_of_a_dimension_of_one_does_not_matter() -> None:
    gradient = torch.arange(1.0, 5.0)
    column = torch.as_strided(gradient, (4, 1), (1, 4))
    assert column.stride() != torch.zeros(4, 1).stride()
    torch.testing.assert_close(_stepped(torch.zeros(4, 1), [column])[:, 0], _stepped(torch.zeros(4), [gradient]))


def test_a_gradient_in_another_order_is_not_walked_through() -> None:
    with pytest.raises(AssertionError):
        _stepped(torch.zeros(3, 4), [torch.ones(4, 3).T])
