"""The references with frozen weights: where they must be full training, or one another."""

import pytest
import torch

from tests.reference.basis import singular_basis, uniform_basis
from tests.reference.trial import ETA, SHAPES, assert_same_path, gaussian, gradient_at, path, rule_for


@pytest.mark.parametrize("name", ["galore", "golore"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_basis_of_full_rank_with_carried_momentum_is_full_momentum(name: str, shape: tuple[int, int]) -> None:
    choice = {"rank": min(shape), "alpha": 1.0, "optimizer": "msgd", "moments": "carried"}
    assert_same_path(rule_for(name, shape, **choice), rule_for("full", shape, optimizer="msgd"))


def test_momentum_that_is_kept_but_not_carried_goes_another_way() -> None:
    choice = {"rank": 6, "alpha": 1.0, "optimizer": "msgd", "moments": "kept"}
    galore, full = path(rule_for("galore", (6, 9), **choice)), path(rule_for("full", (6, 9), optimizer="msgd"))
    torch.testing.assert_close(galore[4], full[4])
    assert (galore[5] - full[5]).abs().max() > 1e-3


def test_reset_moments_make_each_period_a_first_one() -> None:
    rule = rule_for("galore", (6, 9), moments="reset")
    path(rule, 4)
    fresh = rule_for("galore", (6, 9))
    fresh.weight = rule.weight
    gradient = gradient_at(rule.weight, 4)
    rule.update(gradient, ETA, 4)
    fresh.update(gradient, ETA, 0)
    torch.testing.assert_close(rule.weight, fresh.weight)


def test_golore_is_galore_before_the_last_share_of_the_steps() -> None:
    golore = path(rule_for("golore", (6, 9), random_fraction=1 / 3))
    galore = path(rule_for("galore", (6, 9), moments="carried"))
    torch.testing.assert_close(golore[8], galore[8])  # of 12 steps, the switch before step 8 is the first random one
    assert (golore[9] - galore[9]).abs().max() > 1e-4


def test_garares_pseudo_inverse_is_the_transpose_of_an_orthonormal_basis() -> None:
    rules = [rule_for("garare", (8, 5), back_projection=kind) for kind in ("pinv", "transpose")]
    for rule in rules:
        rule.draws.gaussian = lambda step, rows, rank: uniform_basis(gaussian(step, shape=(rows, rank)))
    assert_same_path(*rules)


def test_garare_stands_left_and_flora_where_the_shorter_side_is() -> None:
    assert rule_for("garare", (8, 5)).moments.M.shape == (3, 5)
    assert rule_for("flora", (8, 5)).moments.M.shape == (8, 3)
    assert rule_for("flora", (6, 6)).moments.M.shape == (3, 6)


@pytest.mark.parametrize("name", ["gasare", "gosare"])
@pytest.mark.parametrize("optimizer", ["adamw", "msgd"])
def test_all_entries_trained_is_full_training(name: str, optimizer: str) -> None:
    assert_same_path(
        rule_for(name, (6, 9), density=1.0, optimizer=optimizer), rule_for("full", (6, 9), optimizer=optimizer)
    )


def test_gasare_takes_the_lowest_of_equal_entries_and_leaves_the_others() -> None:
    rule = rule_for("gasare", (2, 3), density=0.5, problem={"decay": 0.0})
    before = rule.weight
    rule.update(torch.tensor([[1.0, -2.0, 1.0], [1.0, 2.0, 0.5]], dtype=torch.float64), ETA, 0)
    assert (rule.weight != before).tolist() == [[True, True, False], [False, True, False]]


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("shape", SHAPES)
def test_galore_plus_without_heads_is_galore(svd: str, shape: tuple[int, int]) -> None:
    assert_same_path(rule_for("galore_plus", shape, svd=svd), rule_for("galore", shape, svd=svd))


def test_galore_plus_with_one_head_and_no_residual_is_galore_on_the_right() -> None:
    assert_same_path(
        rule_for("galore_plus", (8, 5), heads=1, residual_density=0.0, svd="exact"), rule_for("galore", (8, 5))
    )


def test_galore_plus_stacks_as_many_heads_as_the_rank_needs() -> None:
    rule = rule_for("galore_plus", (8, 5), heads=4, svd="exact")  # d_k = 2, r = 3
    G = gradient_at(rule.weight, 0)
    first, second = rule.draws.heads(0, 2)
    stacked = torch.cat([G[2 * first : 2 * first + 2], G[2 * second : 2 * second + 2]])
    torch.testing.assert_close(rule.choose(G, 0), singular_basis(stacked.T, 3))


def test_no_residual_remains_where_the_basis_is_full() -> None:
    choice = {"heads": 1, "rank": 5, "svd": "exact"}
    assert_same_path(
        rule_for("galore_plus", (8, 5), residual_density=1.0, **choice),
        rule_for("galore_plus", (8, 5), residual_density=0.0, **choice),
        rtol=1e-6,  # of what rounding leaves of G − Ĝ, over ε
    )


def test_the_first_residual_is_the_part_of_the_gradient_that_the_basis_misses() -> None:
    choice = {"heads": 2, "svd": "exact", "residual_floor": 0.25}
    rule = rule_for("galore_plus", (8, 5), residual_density=0.3, **choice)
    plain = rule_for("galore_plus", (8, 5), residual_density=0.0, **choice)
    before = path(rule, 3)[-1]
    torch.testing.assert_close(before, path(plain, 3)[-1])
    core = rule.moments.M @ rule.basis.T
    chosen = core.abs().flatten().sort(descending=True).indices[: int(0.3 * 40)]
    G = gradient_at(before, 3)
    rule.update(G, ETA, 3)
    plain.update(G, ETA, 3)
    seen = G @ rule.basis @ rule.basis.T
    share = rule.moments.V / (1 - 0.99**4) @ (rule.basis**2).T
    expected = torch.zeros(40, dtype=torch.float64)
    for i in chosen.tolist():
        g, s, u = G.flatten()[i], seen.flatten()[i], share.flatten()[i]
        expected[i] = max(-1.0, min(1.0, (g - s) / (max(u + 2 * s * (g - s), 0.25 * u) ** 0.5 + 1e-8)))
    torch.testing.assert_close((plain.weight - rule.weight).flatten(), ETA * expected)
