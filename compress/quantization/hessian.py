"""Linear algebra on the Hessian of a linear: damping, its Cholesky factor, and the factor that GPTQ walks along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Tried in turn when the damped Hessian is not positive definite; shares of its mean diagonal.
DAMPING_LADDER = (0.03, 0.1, 0.3, 1.0)
SMALLEST_SPLIT = 256  # triangles up to this wide are inverted by substitution, wider ones by products of their halves


@dataclass(frozen=True, eq=False, slots=True)
class Cholesky:
    """lower: L (in, in) float32, lower triangular with damped(H, damp_frac) = L L^T."""

    lower: Tensor
    damp_frac: float

    def divide(self, rows: Tensor) -> Tensor:
        """rows @ inverse(damped(H, damp_frac)), for rows (n, in) float32."""
        halfway = torch.linalg.solve_triangular(self.lower.mT, rows, upper=True, left=False)
        return torch.linalg.solve_triangular(self.lower, halfway, upper=False, left=False)


@dataclass(frozen=True, eq=False, slots=True)
class Factored:
    """upper: U (in, in) float32, upper triangular with inverse(damped(H, damp_frac)) = U^T U."""

    upper: Tensor
    damp_frac: float


def damped(hessian: Tensor, damp_frac: float) -> Tensor:
    """H + damp_frac * mean(diag H) * I, where dead inputs (zero diagonal) get the mean diagonal instead of zero."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    result = hessian.clone()
    result.diagonal().add_(torch.where(diagonal == 0, mean, mean * damp_frac))
    return result


def cholesky(hessian: Tensor, damp_frac: float) -> Cholesky | None:
    """Factors the damped Hessian, raising the damping along the ladder until it is positive definite.

    None when the ladder ends without success (the caller records its fallback).
    """
    return next(_attempts(hessian, damp_frac), None)


def factor(hessian: Tensor, damp_frac: float) -> Factored | None:
    """Factors the inverse of the damped Hessian; damping, and None, as `cholesky` has them.

    U comes from one Cholesky factorisation of the index-reversed matrix and one triangular inverse, which is cheaper
    and loses less than inverting first: reversed(H) = L L^T gives H = M M^T with M = reversed(L) upper, so
    U = inv(M) = reversed(inv(L)).
    """
    for found in _attempts(hessian.flip(0, 1), damp_frac):
        upper = inverse_of_triangle(found.lower).flip(0, 1)
        if torch.isfinite(upper).all():
            return Factored(upper, found.damp_frac)
    return None


def _attempts(hessian: Tensor, damp_frac: float) -> Iterator[Cholesky]:
    """Its factors from `damp_frac` up the ladder, where there are any."""
    if not (torch.isfinite(hessian).all() and hessian.diagonal().mean() > 0):
        return
    for frac in (damp_frac, *(step for step in DAMPING_LADDER if step > damp_frac)):
        lower, info = torch.linalg.cholesky_ex(damped(hessian, frac))
        if int(info) == 0:
            yield Cholesky(lower, frac)


def inverse_of_triangle(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix (n, n): [[A, 0], [B, C]] becomes [[A', 0], [-C' B A', C']]."""
    width = lower.shape[0]
    if width <= SMALLEST_SPLIT:
        return torch.linalg.solve_triangular(lower, torch.eye(width, dtype=lower.dtype), upper=False)
    half = width // 2
    inverse = torch.zeros_like(lower, memory_format=torch.contiguous_format)
    inverse[:half, :half] = inverse_of_triangle(lower[:half, :half])
    inverse[half:, half:] = inverse_of_triangle(lower[half:, half:])
    inverse[half:, :half] = inverse[half:, half:] @ (-lower[half:, :half] @ inverse[:half, :half])
    return inverse
