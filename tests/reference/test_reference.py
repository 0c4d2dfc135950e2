"""What holds of every reference rule, and of Adam, the bases and the loop that they share."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference.basis import randomized_basis, singular_basis, uniform_basis
from tests.reference.loop import train
from tests.reference.rules import RULES, rate_factor
from tests.reference.trial import ETA, SHAPES, gaussian, gradient_at, path, rule_for
from trainer.methodconfig import METHOD_CONFIGS
from trainer.schedule import learning_rate


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_moves_its_weight_and_stays_finite(name: str, shape: tuple[int, int]) -> None:
    heads = 2 if name == "galore_plus" and shape[0] % 2 == 0 else 0
    weights = path(rule_for(name, shape, heads=heads))
    assert all(torch.isfinite(W).all() for W in weights)
    assert all((a != b).any() for a, b in zip(weights, weights[1:], strict=False))


def test_the_table_has_every_method() -> None:
    assert RULES.keys() == METHOD_CONFIGS.keys()


# ------------------------------------------------------------------------------------------------------ adam, bases


def test_full_is_torchs_adamw() -> None:
    rule = rule_for("full", (6, 9))
    W = nn.Parameter(rule.weight.clone())
    optimizer = torch.optim.AdamW([W], lr=ETA, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for step, expected in enumerate(path(rule)):
        torch.testing.assert_close(W.detach(), expected)
        W.grad = gradient_at(W.detach(), step)
        optimizer.step()


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_the_singular_basis_is_the_svds(m: int, n: int) -> None:
    U, _, Vh = torch.linalg.svd(gaussian("any", shape=(m, n)), full_matrices=False)
    T = U * torch.logspace(0, -7, min(m, n), dtype=torch.float64) @ Vh  # fourteen decades once squared
    P = singular_basis(T, 5)
    torch.testing.assert_close((P.T @ U[:, :5]).abs(), torch.eye(5, dtype=torch.float64), atol=1e-7, rtol=0)
    assert (P.gather(0, P.abs().argmax(0, keepdim=True)) > 0).all()
    sketch = gaussian("sketch", shape=(n, min(m, n)))
    torch.testing.assert_close(randomized_basis(T, 5, sketch, 2), P, atol=1e-7, rtol=0)


@pytest.mark.parametrize("true_rank", [0, 2])
def test_a_basis_is_orthonormal_where_the_gradient_has_too_little_rank(true_rank: int) -> None:
    P = singular_basis(gaussian("l", shape=(8, true_rank)) @ gaussian("r", shape=(true_rank, 9)), 4)
    torch.testing.assert_close(P.T @ P, torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0)


def test_the_uniform_basis_is_the_q_with_a_positive_diagonal_of_r() -> None:
    Z = gaussian("any", shape=(7, 4))
    Q, R = torch.linalg.qr(Z)
    torch.testing.assert_close(uniform_basis(Z), Q * R.diagonal().sign())


def test_the_rate_warms_up_again_after_each_restart() -> None:
    def settings(name: str, w: int) -> Any:
        return METHOD_CONFIGS[name](rank=2, period=4, restart_warmup=w)

    assert [rate_factor(settings("relora", 2), t) for t in range(9)] == [1, 1, 1, 1, 0.5, 1, 1, 1, 0.5]
    assert [rate_factor(settings("loro", 5), t) for t in range(8)] == [1, 1, 1, 1, 0.2, 0.4, 3 / 5, 1]
    assert {rate_factor(settings(name, 0), t) for name in ("loro", "relora") for t in range(9)} == {1.0}
    assert rate_factor(METHOD_CONFIGS["galore"](rank=2), 5) == 1.0


# ------------------------------------------------------------------------------------------------------- the loop


class Bigram(nn.Module):
    """The smallest causal language model: the next token from this one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        for name, parameter in self.named_parameters():
            parameter.data = gaussian(name, shape=tuple(parameter.shape))

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.middle(self.embedding(input_ids))))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def test_the_loop_with_full_rules_is_torchs_adamw() -> None:
    optimisation = SimpleNamespace(steps=10, warmup_steps=2, learning_rate=0.03, final_rate_ratio=0.1)
    batches = [torch.arange(24).reshape(3, 8) * (step + 2) % 11 for step in range(10)]
    problem = rule_for("full", (6, 6)).problem
    ours, theirs = Bigram(), Bigram()
    rules = {"middle.weight": RULES["full"](ours.middle.weight, problem, None)}
    losses = train(optimisation, ours, batches, rules, problem)
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    flat = [{"params": decayed, "weight_decay": 0.1}, {"params": [theirs.middle.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(flat, betas=(0.9, 0.99), eps=1e-8)
    for step, tokens in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, optimisation)
        loss = theirs(tokens, tokens).loss
        assert loss.item() == pytest.approx(losses[step], rel=1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
