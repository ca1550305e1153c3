"""How a sparsity is shared out among decoder blocks, so that all of them together still have it exactly.

OWL (Yin et al., arXiv:2310.05175): blocks whose weights times input norms hold more outliers keep more. AlphaPruning
(Lu et al., arXiv:2410.10912), without text: blocks whose eigenvalue spectra have heavier tails, which training shapes,
keep more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

OUTLIER = 5.0
"""OWL: what is so many times the mean is an outlier."""
OWL_SPREAD = 0.08
"""OWL: the densest and the sparsest block are at most twice this from each other."""
ALPHA_SPREAD = 0.3
"""AlphaPruning: sparsities lie within this share of the mean."""
LEAST, MOST = 0.01, 0.99


def by_outliers(ratios: Sequence[float], sizes: Sequence[int], share: float) -> list[float]:
    """The sparsity of each block from its share of outliers (OWL); sizes: how many weights each has."""
    low, high = min(ratios), max(ratios)
    reach = (high - low) or 1.0
    return balanced([share - (ratio - low) / reach * 2 * OWL_SPREAD for ratio in ratios], sizes, share)


def by_spectra(alphas: Sequence[float], sizes: Sequence[int], share: float) -> list[float]:
    """The sparsity of each block from the exponent of its spectrum's tail (AlphaPruning): the higher, the more goes."""
    low, high = min(alphas), max(alphas)
    reach = (high - low) or 1.0
    wanted = [share * (1 - ALPHA_SPREAD + 2 * ALPHA_SPREAD * (alpha - low) / reach) for alpha in alphas]
    return balanced(wanted, sizes, share)


def balanced(wanted: Sequence[float], sizes: Sequence[int], share: float) -> list[float]:
    """The wanted sparsities moved by one number, within LEAST and MOST, to the mean `share` over all weights."""
    total = sum(sizes)

    def moved(by: float) -> list[float]:
        return [min(MOST, max(LEAST, each + by)) for each in wanted]

    low, high = -2.0, 2.0
    for _ in range(64):
        middle = (low + high) / 2
        mean = sum(each * size for each, size in zip(moved(middle), sizes, strict=True)) / total
        low, high = (middle, high) if mean < share else (low, middle)
    return moved(high)


def outliers(weight: Tensor, square_mean: Tensor, mean: float) -> int:
    """How many of |W_ij| ||x_j|| are outliers against their mean in the block. Arguments as in `importance`."""
    return int((importance(weight, square_mean) > OUTLIER * mean).sum())


def importance(weight: Tensor, square_mean: Tensor) -> Tensor:
    """|W_ij| ||x_j||: (out, in). weight (out, in), square_mean (in,): mean x^2, both float32."""
    return weight.abs() * square_mean.sqrt()


def tail_exponent(weight: Tensor) -> float:
    """Hill's estimate of alpha in density ~ eigenvalue^-alpha, over the upper half of the spectrum of W W^T."""
    rows = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    values = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0)
    tail = values[values.shape[0] // 2 :]
    if float(tail[0]) <= 0:
        return 1.0  # half of the spectrum is zero: the heaviest tail there is
    logs = float((tail / tail[0]).log().sum())
    return 1.0 + len(tail) / logs if logs > 0 else math.inf
