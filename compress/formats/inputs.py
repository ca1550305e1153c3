"""Rounding the inputs of a linear as an engine's kernel does before the product: to int8, FP8 or FP4, and back.

The product of rounded values in floating point is what an integer or FP8 kernel computes, up to the order of its sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats import e8m0, fp4, fp8
from compress.types import InputScheme

ZERO_BLOCK = 0.125
SMALLEST_RANGE = 1e-12
SMALLEST_NARROW = 1e-5


def round_inputs(x: Tensor, scheme: InputScheme, scale: Tensor | None = None) -> Tensor:
    """x (..., in) rounded as the scheme says, in its own dtype; the arithmetic is float32.

    scale: (1,), for inputs of which something is stored: their scale, or what multiplies the scales of their blocks.
    """
    values = x.float()
    if scheme.granularity == "group":
        assert scheme.group_size is not None
        values = values.unflatten(-1, (-1, scheme.group_size))
    stored = None if scale is None else scale.to(x.device).float()
    if scheme.narrow:
        factor = scheme.steps / values.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST_NARROW)
        return (torch.round(values * factor).clamp_(-128, 127) / factor).to(x.dtype)
    if scheme.scale_type == "e4m3":
        assert stored is not None
        step = _fp8_scale(values, scheme, stored)
    elif scheme.scale_type == "e8m0":
        step = _power_of_two(values, scheme)
    else:
        step = _dynamic_scale(values, scheme) if stored is None else stored
    return (_nearest(values / step, scheme) * step).reshape(x.shape).to(x.dtype)


def static_scale(highest: float, scheme: InputScheme) -> float:
    """What is stored so that inputs up to |x| = highest are covered: their scale, or what multiplies block scales."""
    if scheme.scale_type == "e4m3":
        return fp8.HIGHEST * scheme.steps / max(highest, SMALLEST_RANGE)
    return highest / scheme.steps


def _nearest(scaled: Tensor, scheme: InputScheme) -> Tensor:
    if scheme.type == "int":
        return torch.round(scaled).clamp_(-128, 127)
    return fp4.nearest(scaled) if scheme.bits == 4 else fp8.encode(scaled).float()


def _fp8_scale(values: Tensor, scheme: InputScheme, multiplier: Tensor) -> Tensor:
    """NVFP4's: each block's scale is rounded to E4M3 after multiplication; a block of zeros gets one that divides."""
    rounded = fp8.encode(multiplier * (values.abs().amax(-1, keepdim=True) / scheme.steps)).float()
    return torch.where(rounded == 0, ZERO_BLOCK, rounded) / multiplier


def _power_of_two(values: Tensor, scheme: InputScheme) -> Tensor:
    """As the compressed-tensors package has it, which for 8 bits is RCEIL: the octave of the largest |x|, or the next
    above from 1.75 of it on, is put on the octave of the largest code. Four-bit codes saturate between."""
    mantissa, exponent = torch.frexp(values.abs().amax(-1, keepdim=True))
    octave = exponent - 1 + (mantissa >= 0.875).int() - (2 if scheme.bits == 4 else 8)
    lowest = torch.full_like(octave, -e8m0.BIAS)
    biased = torch.where(mantissa == 0, lowest, octave).clamp_(-e8m0.BIAS, e8m0.LARGEST - e8m0.BIAS) + e8m0.BIAS
    return e8m0.decode(biased.to(torch.uint8))


def _dynamic_scale(values: Tensor, scheme: InputScheme) -> Tensor:
    """One scale for each row of the last dimension; a row of zeros gets one that divides."""
    scale = values.abs().amax(-1, keepdim=True) / scheme.steps
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
