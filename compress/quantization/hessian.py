"""Linear algebra on the Hessian of a linear: damping, and the factor that GPTQ walks along."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Tried in turn when the damped Hessian is not positive definite; shares of its mean diagonal.
DAMPING_LADDER = (0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True, eq=False, slots=True)
class Factored:
    """upper: U (in, in) float32, upper triangular with inverse(damped(H, damp_frac)) = U^T U."""

    upper: Tensor
    damp_frac: float


def damped(hessian: Tensor, damp_frac: float) -> Tensor:
    """H + damp_frac * mean(diag H) * I, where dead inputs (zero diagonal) get the mean diagonal instead of zero."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    extra = torch.where(diagonal == 0, mean, mean * damp_frac)
    return hessian + torch.diag(extra)


def factor(hessian: Tensor, damp_frac: float) -> Factored | None:
    """Factors the damped Hessian, raising the damping along the ladder until it is positive definite.

    U comes from one Cholesky factorisation of the index-reversed matrix and one triangular inverse, which is cheaper
    and loses less than inverting first: reversed(H) = L L^T gives H = M M^T with M = reversed(L) upper, so U = inv(M).
    None when the ladder ends without success (the caller records its fallback).
    """
    if not (torch.isfinite(hessian).all() and hessian.diagonal().mean() > 0):
        return None
    for frac in (damp_frac, *(step for step in DAMPING_LADDER if step > damp_frac)):
        matrix = damped(hessian, frac)
        lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if int(info) == 0:
            identity = torch.eye(matrix.shape[0], dtype=matrix.dtype)
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if torch.isfinite(upper).all():
                return Factored(upper.contiguous(), frac)
    return None
