"""Magnitude pruning (Han et al., arXiv:1506.02626): the smallest weights of a matrix go. The data-free baseline."""

from __future__ import annotations

from torch import Tensor

from compress.pruning.masks import lowest
from compress.types import Sparsity


def mask(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """The weights that go, (out, in) bool, compared over the whole weight (out, in)."""
    return lowest(weight.abs(), sparsity, "matrix")
