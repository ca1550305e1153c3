"""Wanda (Sun et al., arXiv:2306.11695): |W_ij| ||X_j||, compared within each output row; nothing is updated."""

from __future__ import annotations

from torch import Tensor

from compress.pruning.configs import WandaConfig
from compress.pruning.masks import lowest
from compress.types import Sparsity


def mask(weight: Tensor, square_mean: Tensor, sparsity: Sparsity, config: WandaConfig) -> Tensor:
    """The weights that go, (out, in) bool. weight (out, in), square_mean (in,): mean x^2, both float32."""
    return lowest(weight.abs() * square_mean.pow(config.exponent / 2), sparsity, config.scope)
