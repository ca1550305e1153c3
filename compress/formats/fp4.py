"""FP4 E2M1 (OCP Microscaling Formats, arXiv:2310.10537): 2 bits of exponent, 1 of mantissa, no infinities, up to 6.

A code is sign << 3 | index in 0, 0.5, 1, 1.5, 2, 3, 4, 6. Two share a byte, the even column in the low half. Values are
rounded to the nearest, ties to the even mantissa, and saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.types import E2M1

HIGHEST = E2M1[-1]


def nearest(values: Tensor) -> Tensor:
    """The nearest numbers of E2M1, float32; what rounds to zero keeps its sign."""
    size = values.abs().clamp_(max=HIGHEST)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign(torch.round(size / step).mul_(step), values)


def encode(values: Tensor) -> Tensor:
    """The nearest codes, uint8."""
    rounded = nearest(values)
    size = rounded.abs()
    index = torch.where(size <= 2, 2 * size, torch.where(size <= 4, size + 2, 7.0)).to(torch.uint8)
    return index | (torch.signbit(rounded).to(torch.uint8) << 3)


def pack(codes: Tensor) -> Tensor:
    """Codes (rows, n) of an even n in bytes (rows, n / 2)."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
