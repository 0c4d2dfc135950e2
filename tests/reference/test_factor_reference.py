"""The references with trained factors against autograd and torch's own AdamW."""

import pytest
import torch
from torch import Tensor, nn

from tests.reference.rules import Rule
from tests.reference.trial import ETA, gaussian, gradient_at, path, rule_for


def composed(name: str, rule: Rule, parts: dict[str, Tensor]) -> Tensor:
    """The effective weight by autograd's own road."""
    scale = 1.0 if name == "lowrank" else rule.problem.settings.alpha / rule.problem.settings.rank
    product = scale * parts["B"] @ parts["A"]
    if name == "sltrain":
        flat = torch.zeros(product.numel(), dtype=product.dtype)
        return product + flat.scatter(0, rule.positions, parts["values"]).view_as(product)
    if name == "dora":
        D = rule.base + product
        return parts["g"][:, None] * D / D.norm(dim=1, keepdim=True).detach()
    return product if name == "lowrank" else rule.base + product


@pytest.mark.parametrize("name", ["lowrank", "lora", "dora", "sltrain"])
def test_the_chain_rule_by_hand_is_autograds_with_torchs_adamw(name: str) -> None:
    rule = rule_for(name, (6, 9))
    parts = {"B": rule.factors.B, "A": rule.factors.A}
    parts |= {"g": rule.base.norm(dim=1)} if name == "dora" else {}
    parts |= {"values": rule.values} if name == "sltrain" else {}
    parts = {key: nn.Parameter(value.clone()) for key, value in parts.items()}
    groups = [{"params": [p], "weight_decay": 0.0 if key == "g" else 0.1} for key, p in parts.items()]
    optimizer = torch.optim.AdamW(groups, lr=ETA, betas=(0.9, 0.99), eps=1e-8)
    for step, expected in enumerate(path(rule)):
        W = composed(name, rule, parts)
        torch.testing.assert_close(W.detach(), expected)
        optimizer.zero_grad()
        W.backward(gradient_at(W.detach(), step))
        optimizer.step()


@pytest.mark.parametrize("name", ["lora", "dora", "relora"])
def test_factors_beside_a_frozen_weight_begin_without_effect(name: str) -> None:
    torch.testing.assert_close(rule_for(name, (6, 9)).weight, gaussian("weight", shape=(6, 9)))


def test_a_restart_of_relora_leaves_the_weight_and_prunes_the_moments() -> None:
    rule = rule_for("relora", (6, 9))
    before = path(rule, 4)[-1]
    second, count = rule.factors.moments["A"].M, rule.factors.moments["A"].count
    rule.restart(4)
    torch.testing.assert_close(rule.base + rule.factors.product(), before)
    kept = rule.draws.kept(4, "A", "m")
    torch.testing.assert_close(rule.factors.moments["A"].M, torch.where(kept, second, 0.0))
    assert rule.factors.moments["A"].count == count and 0 < kept.sum() < kept.numel()
