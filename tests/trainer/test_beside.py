"""The product with factors beside a frozen matrix, against autograd on the plain expression."""

import pytest
import torch
from torch import Tensor

from trainer.lowrank.beside import product_beside, together, whole_is_cheaper

M, N, R, SCALE = 12, 20, 3, 0.7
# 2·M·N / (M + N) is 15: with 2 × 7 rows of x the products stay apart, with 2 × 8 they are one.
FEW, MANY = 7, 8


def drawn(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x (2, length, n), W (m, n), B (m, r), A (r, n)."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, N), (M, N), (M, R), (R, N)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("length", [FEW, MANY])
@pytest.mark.parametrize("formed", [False, True], ids=["by itself", "formed before"])
def test_value_and_gradients_are_autograds_own(length: int, formed: bool) -> None:
    x, weight, b, a = drawn(length)
    assert whole_is_cheaper(2 * length, weight) == (length == MANY)
    leaves = [value.requires_grad_() for value in (x, b, a)]
    given = together(weight, b, a, SCALE).detach() if formed else None
    y = product_beside(x, weight, b, a, SCALE, given)
    expected = x @ (weight + SCALE * b @ a).T
    out = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    mine, its = torch.autograd.grad(y, leaves, out), torch.autograd.grad(expected, leaves, out)
    torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def test_a_vector_has_a_product_too() -> None:
    x, weight, b, a = drawn(FEW)
    torch.testing.assert_close(product_beside(x[0, 0], weight, b, a, SCALE), x[0, 0] @ (weight + SCALE * b @ a).T)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    x, weight, b, a = drawn(FEW)
    b.requires_grad_()
    (first,) = torch.autograd.grad(product_beside(x, weight, b, a, SCALE).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    x, weight, b, a = drawn(MANY)
    b.requires_grad_()
    a.requires_grad_()
    product_beside(x, weight, b, a, SCALE).sum().backward()
    assert x.grad is None and b.grad is not None and a.grad is not None


def test_in_bf16_a_change_below_the_weights_digits_is_not_lost() -> None:
    x, _, b, a = drawn(5, torch.bfloat16)
    weight = torch.ones(M, N, dtype=torch.bfloat16)
    small = 2.0**-10  # of B A's elements, which beside 1 are less than half of bf16's last place
    y = product_beside(x, weight, b, a, small)
    change = (y - x @ weight.T).float()
    wanted = small * (x @ (b @ a).T).float()
    assert bool((weight + small * (b @ a) == weight).float().mean() > 0.8)
    # What is left is y's own rounding.
    assert torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.8
