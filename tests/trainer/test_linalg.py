"""Properties of the bases."""

import pytest
import torch

from trainer.lowrank.linalg import canonical_signs, energy_kept, exact_basis, random_basis, randomized_basis


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall off, as a gradient's do."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    smaller = min(rows, columns)
    values = torch.zeros(rows, columns)
    values[range(smaller), range(smaller)] = 0.8 ** torch.arange(smaller)
    return left @ values @ right


def bases(g: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "exact": exact_basis(g, rank),
        "randomized": randomized_basis(g, rank, 8, 2, generator),
        "random": random_basis(g.shape[0], rank, generator).float(),
    }


@pytest.mark.parametrize("kind", ["exact", "randomized", "random"])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (40, 40)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_a_basis_has_orthonormal_columns(kind: str, shape: tuple[int, int], rank: int) -> None:
    basis = bases(matrix(*shape), rank)[kind]
    assert basis.shape == (shape[0], rank)
    assert basis.dtype == torch.float32
    assert (basis.T @ basis - torch.eye(rank)).abs().max() < 1e-5


def test_the_exact_basis_keeps_the_most_energy_there_is() -> None:
    g = matrix(40, 90)
    values = torch.linalg.svdvals(g.double())
    best = float(values[:7].square().sum() / values.square().sum())
    kept = {kind: energy_kept(g, basis) for kind, basis in bases(g, 7).items()}
    assert kept["exact"] == pytest.approx(best, abs=1e-6)
    assert kept["randomized"] == pytest.approx(best, abs=1e-4)
    assert kept["random"] < 0.5 * best


def test_projecting_is_the_adjoint_of_embedding() -> None:
    """⟨PᵀG, R⟩ = ⟨G, PR⟩ for every G and R."""
    g, p = matrix(40, 90), exact_basis(matrix(40, 90), 7)
    r = torch.randn(7, 90, generator=torch.Generator().manual_seed(3))
    assert float((p.T @ g * r).sum()) == pytest.approx(float((g * (p @ r)).sum()), abs=1e-4)


def test_signs_do_not_depend_on_those_of_the_decomposition() -> None:
    p = exact_basis(matrix(40, 90), 7)
    flipped = p * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    assert torch.equal(canonical_signs(flipped), canonical_signs(p))


def test_the_randomized_basis_depends_on_its_seed_alone() -> None:
    g = matrix(40, 90)
    one = [randomized_basis(g, 7, 8, 2, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(one[0], one[1])
    assert not torch.equal(one[0], one[2])


def test_a_zero_gradient_has_a_basis_too() -> None:
    zero = torch.zeros(6, 9)
    basis = exact_basis(zero, 3)
    assert (basis.T @ basis - torch.eye(3)).abs().max() < 1e-6
    assert energy_kept(zero, basis) == 1.0
