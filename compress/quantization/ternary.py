"""Ternary weights as BitNet b1.58 has them (Ma et al., arXiv:2402.17764, equations 1 to 3): -1, 0 or 1 times one scale.

The scale of a matrix is the mean of |w|, and codes are nearest, clipped. It is what a model trained that way computes
with: from the weights that its training kept, this gives the very matrices. A matrix that holds only 0 and plus or
minus one value is ternary already, and keeps that value as its scale, which the mean misses by the share of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.scales import stored_scale
from compress.types import IntScheme, QuantizedTensor


def transform(weight: Tensor, scheme: IntScheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Quantises one weight (out, in) float32; every row's scale is the one of the matrix."""
    size = weight.abs()
    highest = size.amax()
    ternary = bool(((size == 0) | (size == highest)).all())
    wanted = highest if ternary else size.mean(dtype=torch.float64).float()
    scale = stored_scale(wanted.reshape(1, 1), scale_dtype, -scheme.qmin)
    codes = torch.round(weight / scale.float()).clamp_(-1, 1).to(torch.int8)
    return QuantizedTensor(codes, scale.repeat(weight.shape[0], 1), None, scheme)
