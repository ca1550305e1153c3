"""FP8 E4M3 (Micikevicius et al., arXiv:2209.05433): 4 bits of exponent, 3 of mantissa, no infinities, up to 448.

Codes are torch's `float8_e4m3fn`, one byte each. Values are rounded to the nearest, ties to even, and saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.types import FP8_HIGHEST, FP8_TILE

E4M3 = torch.float8_e4m3fn
HIGHEST = FP8_HIGHEST


def encode(values: Tensor) -> Tensor:
    """The nearest codes of floating-point values; what lies outside the range saturates."""
    return values.clamp(-FP8_HIGHEST, FP8_HIGHEST).to(E4M3)


def tiles(weight: Tensor) -> Tensor:
    """weight (out, in) as (rows, FP8_TILE, columns, FP8_TILE), padded with zeros to whole tiles."""
    out, width = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -width % FP8_TILE, 0, -out % FP8_TILE))
    return padded.reshape(padded.shape[0] // FP8_TILE, FP8_TILE, -1, FP8_TILE)
