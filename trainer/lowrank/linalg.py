"""Bases from matrices: pure functions, nothing changed in place.

Legend: m rows, n columns, r rank. Every basis here spans the *left* space of its argument, has shape (m, r) and
orthonormal columns; the right space of G is the left space of Gᵀ.
"""

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """At least float32: what sums and decompositions are done in. Not a copy where nothing needs to change."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def canonical_signs(basis: Tensor) -> Tensor:
    """Flip columns so that the entry of largest magnitude in each is positive.

    A singular vector is only defined up to its sign, and moments kept across a switch depend on it.
    """
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0)


def exact_basis(matrix: Tensor, rank: int) -> Tensor:
    """Left singular vectors of the `rank` largest singular values, computed in float64, returned in float32 or wider.

    (m, n) → (m, r). Raises torch.linalg.LinAlgError where the decomposition does not converge. Float64, because
    float32 noise in a singular vector is divided by the gap to the next one and then passes through Adam's sign-like
    first step: the same matrix on one thread and on two gives weights that differ by a tenth of a step.
    """
    left, _, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return canonical_signs(left[:, :rank]).to(wide(matrix).dtype)


def randomized_basis(
    matrix: Tensor, rank: int, oversampling: int, power_iterations: int, generator: torch.Generator
) -> Tensor:
    """Approximate top left singular vectors by subspace iteration (Halko, Martinsson and Tropp 2011, alg. 4.4 + 5.1).

    (m, n) → (m, r), float32 or wider. `generator` lives on the CPU, so that every device draws the same numbers.
    """
    matrix = wide(matrix)
    rows, columns = matrix.shape
    width = min(rank + oversampling, rows, columns)
    sketch = matrix @ torch.randn(columns, width, generator=generator).to(matrix)
    span, _ = torch.linalg.qr(sketch)
    for _ in range(power_iterations):
        span, _ = torch.linalg.qr(matrix.T @ span)
        span, _ = torch.linalg.qr(matrix @ span)
    # Left singular vectors of the small matrix (width, n) are the eigenvectors of its Gram matrix: a tenth of an SVD's
    # time. In float64, where squaring loses no digit that float32 had; eigenvalues ascend.
    small = (span.T @ matrix).double()
    _, inner = torch.linalg.eigh(small @ small.T)
    return canonical_signs(span @ inner.flip(1)[:, :rank].to(span))


def random_basis(rows: int, rank: int, generator: torch.Generator) -> Tensor:
    """Uniform on the Stiefel manifold: QR of a Gaussian, signs of R's diagonal moved into Q. (m, r), float64."""
    q, upper = torch.linalg.qr(torch.randn(rows, rank, generator=generator).double())
    flipped: Tensor = q * torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return flipped


def energy_kept(matrix: Tensor, basis: Tensor) -> float:
    """‖PᵀG‖² / ‖G‖², the share of the gradient that the basis (m, r) keeps of G (m, n); 1 for a zero matrix."""
    return share_kept(basis.T @ wide(matrix), matrix)


def share_kept(part: Tensor, matrix: Tensor) -> float:
    """‖part‖² / ‖matrix‖²; 1 for a zero matrix. Summed in float64, where no finite float32 matrix is too large."""
    whole = _norm(matrix)
    return (_norm(part) / whole) ** 2 if whole > 0 else 1.0


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def is_finite(matrix: Tensor) -> bool:
    """Whether every element is: where the norm is, all are, and a norm takes no second tensor of the matrix's size."""
    return bool(torch.isfinite(torch.linalg.vector_norm(matrix))) or bool(torch.isfinite(matrix).all())
