"""Rounding the inputs of a linear as an engine's kernel does before the product: to int8 or FP8, and back.

The product of rounded values in floating point is what an integer or FP8 kernel computes, up to the order of its sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats import fp8
from compress.types import InputScheme


def round_inputs(x: Tensor, scheme: InputScheme, scale: Tensor | None = None) -> Tensor:
    """x (..., in) rounded as the scheme says, in its own dtype; the arithmetic is float32.

    scale: (1,), for static inputs only.
    """
    values = x.float()
    if scheme.granularity == "group":
        assert scheme.group_size is not None
        values = values.unflatten(-1, (-1, scheme.group_size))
    step = _dynamic_scale(values, scheme) if scale is None else scale.to(x.device).float()
    scaled = values / step
    codes = torch.round(scaled).clamp_(-128, 127) if scheme.type == "int" else fp8.encode(scaled).float()
    return (codes * step).reshape(x.shape).to(x.dtype)


def static_scale(highest: float, scheme: InputScheme) -> float:
    """The scale that covers inputs up to |x| = highest."""
    return highest / scheme.steps


def _dynamic_scale(values: Tensor, scheme: InputScheme) -> Tensor:
    """One scale for each row of the last dimension; a row of zeros gets one that divides."""
    scale = values.abs().amax(-1, keepdim=True) / scheme.steps
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
