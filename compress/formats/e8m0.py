"""E8M0, the scales of the OCP microscaling formats (arXiv:2310.10537): a byte e stands for 2^(e - 127), 255 for NaN."""

from __future__ import annotations

import torch
from torch import Tensor

BIAS = 127
LARGEST = 254


def decode(scale: Tensor) -> Tensor:
    """The powers of two, float32, of bytes."""
    return scale.view(torch.float8_e8m0fnu).float()


def covering(values: Tensor) -> Tensor:
    """The smallest scales that are at least as large as `values` (RCEIL), as bytes; 1 for zeros."""
    mantissa, exponent = torch.frexp(values.float())
    exponent = exponent - (mantissa == 0.5).int()
    return torch.where(values > 0, exponent + BIAS, BIAS).clamp_(0, LARGEST).to(torch.uint8)
