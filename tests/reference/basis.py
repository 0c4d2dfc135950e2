"""Orthonormal bases, in float64 and by other routes than one would take for speed.

T is the matrix whose left singular vectors are wanted: G for a left basis, Gᵀ for a right one.
"""

import torch
from torch import Tensor


def singular_basis(T: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors of T as columns, signs fixed.

    Eigenvectors of TTᵀ. Squaring loses half the digits of the small ones, so each round believes only those within
    1e-2 of its largest singular value, removes them from T, and looks again. Columns already found are shifted to the
    bottom of the spectrum, which leaves the result orthonormal even where T has less than `rank`.
    """
    T = T.double()
    U = T.new_zeros(T.shape[0], 0)
    while U.shape[1] < rank:
        rest = T - U @ (U.T @ T)
        rest = rest - U @ (U.T @ rest)  # once more, for a rest that is hardly more than rounding
        rest = rest / rest.norm().clamp(min=torch.finfo(rest.dtype).tiny)
        values, vectors = torch.linalg.eigh(rest @ rest.T - U @ U.T)
        values, vectors = values.flip(0), vectors.flip(1)
        believed = max(1, int((values >= 1e-4 * values[0]).sum()))
        U = torch.cat([U, vectors[:, : min(believed, rank - U.shape[1])]], dim=1)
    return positive_signs(U)


def randomized_basis(T: Tensor, rank: int, sketch: Tensor, power_iterations: int) -> Tensor:
    """Halko et al. 2011: Y = TΩ, QR, then QR(TᵀQ) and QR(TQ) in turn, and the left singular vectors of QQᵀT."""
    T = T.double()
    Q, _ = torch.linalg.qr(T @ sketch.to(T))
    for _ in range(power_iterations):
        Q, _ = torch.linalg.qr(T.T @ Q)
        Q, _ = torch.linalg.qr(T @ Q)
    return positive_signs(Q @ singular_basis(Q.T @ T, rank))


def uniform_basis(Z: Tensor) -> Tensor:
    """The Q of Z = QR with a positive diagonal of R: uniform on the Stiefel manifold if Z is Gaussian.

    ZᵀZ = RᵀR (Cholesky), Q = ZR⁻¹; twice, since the first Q is orthonormal only to cond(Z)²·1e-16.
    """
    Q = Z.double()
    for _ in range(2):
        R = torch.linalg.cholesky(Q.T @ Q).T
        Q = torch.linalg.solve_triangular(R, Q, upper=True, left=False)
    return Q


def positive_signs(U: Tensor) -> Tensor:
    """Each column with the sign that makes its entry of largest magnitude positive."""
    return U * column_signs(U)


def column_signs(U: Tensor) -> Tensor:
    """1×r, the sign of each column's entry of largest magnitude."""
    return U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
