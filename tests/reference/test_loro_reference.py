"""The LORO reference against the paper's two other forms of its exact step."""

import pytest
import torch
from torch import Tensor

from tests.reference.loro import balanced, tangent
from tests.reference.trial import ETA, STEPS, gaussian, gradient_at, path, rule_for

B, A, G = gaussian("b", shape=(7, 3)), gaussian("a", shape=(3, 9)), gaussian("g", shape=(7, 9))


def truncated(X: Tensor, rank: int) -> Tensor:
    left, right = balanced(X, rank)
    return left @ right


def test_the_tangent_of_plain_gradients_is_the_projected_gradient() -> None:
    P_B, P_A = B @ torch.linalg.solve(B.T @ B, B.T), A.T @ torch.linalg.solve(A @ A.T, A)
    torch.testing.assert_close(tangent(B, A, G @ A.T, B.T @ G), P_B @ G + G @ P_A - P_B @ G @ P_A)


def test_the_exact_step_is_the_small_svd_of_proposition_4_for_any_directions() -> None:
    N_B, N_A = gaussian("nb", shape=(7, 3)), gaussian("na", shape=(3, 9))  # of no common gradient, as Adam's
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    X, Y = N_B @ torch.linalg.inv(R_A), N_A.T @ torch.linalg.inv(R_B)
    Q_B2, R_B2 = torch.linalg.qr(X - Q_B @ Q_B.T @ X)
    Q_A2, R_A2 = torch.linalg.qr(Y - Q_A @ Q_A.T @ Y)
    top = torch.cat([R_B @ R_A.T - ETA * Y.T @ Q_A, -ETA * R_A2.T], dim=1)
    bottom = torch.cat([-ETA * R_B2, torch.zeros(3, 3, dtype=torch.float64)], dim=1)
    U, S, Vh = torch.linalg.svd(torch.cat([top, bottom]))
    small = torch.cat([Q_B, Q_B2], dim=1) @ (U[:, :3] * S[:3]) @ Vh[:3] @ torch.cat([Q_A, Q_A2], dim=1).T
    torch.testing.assert_close(truncated(B @ A - ETA * tangent(B, A, N_B, N_A), 3), small)


def test_balanced_factors_share_the_singular_values_and_fix_their_signs() -> None:
    left, right = balanced(B @ A, 3)
    torch.testing.assert_close(left @ right, B @ A)
    torch.testing.assert_close(left.T @ left, right @ right.T)
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_an_exact_step_of_the_rule_is_a_riemannian_step_of_the_gradient_where_epsilon_is_huge() -> None:
    huge = 1e9  # M̂/(√V̂ + ε) is then the gradient over ε
    rule = rule_for("loro", (6, 9), period=1, problem={"decay": 0.0, "epsilon": huge, "betas": (0.0, 0.0)})
    gradient = gradient_at(rule.weight, 0)
    expected = truncated(rule.weight - ETA * tangent(rule.B, rule.A, gradient @ rule.A.T, rule.B.T @ gradient), 3)
    rule.update(gradient, ETA * huge, 0)
    torch.testing.assert_close(rule.weight, expected, rtol=1e-6, atol=1e-6)


def test_a_frozen_weight_begins_unchanged_and_keeps_the_part_that_is_not_trained() -> None:
    rule = rule_for("loro", (6, 9), scale=8.0, problem={"frozen": True})
    start = gaussian("weight", shape=(6, 9))
    torch.testing.assert_close(rule.weight, start)
    rest = start - 8.0 * rule.B @ rule.A
    after = path(rule)[-1]
    torch.testing.assert_close(after, rest + 8.0 * rule.B @ rule.A)
    assert (after - start).abs().max() > 1e-2


def test_a_step_that_only_truncates_leaves_a_weight_of_rank_r() -> None:
    svd, none = (path(rule_for("loro", (6, 9), exact_step=kind, refresh=False)) for kind in ("svd", "none"))
    torch.testing.assert_close(svd[4], none[4])
    assert (svd[-1] - none[-1]).abs().max() > 1e-3  # other factors, other directions


@pytest.mark.parametrize("between", ["scaled", "unscaled", "preconditioned"])
def test_the_steps_between_are_steps_of_both_old_factors(between: str) -> None:
    rule = rule_for("loro", (6, 9), between=between, period=STEPS + 1, problem={"decay": 0.0})
    B0, A0, gradient = rule.B, rule.A, gradient_at(rule.weight, 0)
    dB, dA = gradient @ A0.T, B0.T @ gradient
    N_B, N_A = dB / (dB.abs() + 1e-8), dA / (dA.abs() + 1e-8)
    if between == "preconditioned":
        N_B, N_A = torch.linalg.solve(A0 @ A0.T, N_B.T).T, torch.linalg.solve(B0.T @ B0, N_A)
    rate = ETA * 3 / 16 if between == "scaled" else ETA
    rule.update(gradient, ETA, 0)
    torch.testing.assert_close(rule.weight, (B0 - rate * N_B) @ (A0 - rate * N_A))
