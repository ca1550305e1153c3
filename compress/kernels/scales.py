"""Scales as they are stored: rounded to their dtype before any code is computed from them."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the smallest that float16 holds


def stored_scale(scale: Tensor, dtype: torch.dtype, reach: Tensor | int) -> Tensor:
    """`scale` rounded to the dtype it is stored in, kept where codes can be divided by it and decoded to numbers.

    reach: the largest |code - zero point|; its product with the scale stays finite in the dtype.
    """
    limits = torch.finfo(dtype)
    largest = torch.as_tensor(limits.max * (1 - limits.eps) / reach)  # eps, because rounding may go up
    floor = torch.where(scale < 0, -SMALLEST_SCALE, SMALLEST_SCALE)
    kept = torch.where(scale.abs() < SMALLEST_SCALE, floor, scale)
    return torch.minimum(torch.maximum(kept, -largest), largest).to(dtype)
