"""Steps on the manifold of rank-r matrices W = B A: pure functions, nothing changed in place.

Legend: B (m, r), A (r, n), directions dB (m, r) and dA (r, n), η the rate. All in float32 or wider.
(LORO, Mo, Huang and Pan 2025, equation 10 and algorithm 1.)
"""

import torch
from torch import Tensor

# Of the ratio of a factor's smallest to its largest singular value: below it a solve is damped.
NEARLY_SINGULAR = 1e-5


def retracted(b: Tensor, a: Tensor, db: Tensor, da: Tensor, rate: float) -> tuple[Tensor, Tensor, bool]:
    """Factors of SVD_r(BA − η·T), with T the tangent vector that dB and dA stand for, and whether a solve was damped.

    B = Q_B R_B, Aᵀ = Q_A R_A;  X = dB R_A⁻¹, Y = dAᵀ R_B⁻¹;  T = (I − Q_B Q_Bᵀ) X Q_Aᵀ + Q_B Yᵀ, computed from thin QRs
    and an SVD of size 2r, without anything of the size m·n. The new factors share the singular values evenly. The
    paper's printed listing has R_B where the R of X's orthogonal part belongs, and Q_B twice; here the equation is.
    """
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    inverse_a, damped_a = _inverse(ra)
    inverse_b, damped_b = _inverse(rb)
    x, y = db @ inverse_a, da.T @ inverse_b
    qb2, rb2 = torch.linalg.qr(x - qb @ (qb.T @ x))
    qa2, ra2 = torch.linalg.qr(y - qa @ (qa.T @ y))
    core = torch.cat(
        [
            torch.cat([rb @ ra.T - rate * (y.T @ qa), -rate * ra2.T], dim=1),
            torch.cat([-rate * rb2, torch.zeros_like(rb)], dim=1),
        ]
    )
    new_b, new_a = _balanced(torch.cat([qb, qb2], dim=1), core, torch.cat([qa, qa2], dim=1), b.shape[1])
    return new_b, new_a, damped_a or damped_b


def balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, its singular values shared evenly: SVD_r(BA) = (UΣ^½)(Σ^½Vᵀ)."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    return _balanced(qb, rb @ ra.T, qa, b.shape[1])


def preconditioned(b: Tensor, a: Tensor, db: Tensor, da: Tensor, rate: float) -> tuple[Tensor, Tensor, bool]:
    """B − η·dB (AAᵀ)⁻¹ and A − η·(BᵀB)⁻¹ dA (Zhang and Pilanci 2024), and whether a solve was damped."""
    rb, ra = torch.linalg.qr(b).R, torch.linalg.qr(a.T).R
    inverse_a, damped_a = _inverse(ra)
    inverse_b, damped_b = _inverse(rb)
    # AAᵀ = R_Aᵀ R_A
    new_b = b - rate * db @ (inverse_a @ inverse_a.T)
    new_a = a - rate * (inverse_b @ inverse_b.T) @ da
    return new_b, new_a, damped_a or damped_b


def _inverse(r: Tensor) -> tuple[Tensor, bool]:
    """R⁻¹ (r, r), and False; for a nearly singular R the damped Rᵀ(R Rᵀ + μI)⁻¹, μ the threshold squared, and True."""
    values = torch.linalg.svdvals(r)
    eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
    if bool(values[-1] > NEARLY_SINGULAR * values[0]):
        return torch.linalg.solve_triangular(r, eye, upper=True), False
    damping = (NEARLY_SINGULAR * values[0]).square().clamp(min=torch.finfo(r.dtype).tiny)
    u, s, vh = torch.linalg.svd(r)
    return vh.T @ ((s / (s.square() + damping))[:, None] * u.T), True


def _balanced(left: Tensor, core: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the rank-`rank` truncation of left·core·rightᵀ; the largest entry of each left vector is positive."""
    u, values, vh = torch.linalg.svd(core)
    root = values[:rank].sqrt()
    new_b, new_a = left @ u[:, :rank], vh[:rank] @ right.T
    largest = new_b.gather(0, new_b.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(new_b)
    return new_b * signs * root, new_a * signs.T * root[:, None]
