"""RIA (Zhang et al., arXiv:2310.06694): a weight's share of its row and of its column, times a power of ||X_j||."""

from __future__ import annotations

from torch import Tensor

from compress.pruning.configs import RiaConfig
from compress.pruning.masks import lowest
from compress.types import Sparsity

TINY = 1e-30  # an all-zero row or column has no shares; its weights stay at score zero


def mask(weight: Tensor, square_mean: Tensor, sparsity: Sparsity, config: RiaConfig) -> Tensor:
    """The weights that go, (out, in) bool, compared over the whole matrix.

    weight (out, in), square_mean (in,): mean x^2, both float32.
    """
    size = weight.abs()
    shares = size / size.sum(1, keepdim=True).clamp(min=TINY) + size / size.sum(0, keepdim=True).clamp(min=TINY)
    return lowest(shares * square_mean.pow(config.exponent / 2), sparsity, "matrix")
