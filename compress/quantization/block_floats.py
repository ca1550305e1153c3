"""Blocks of floats with a shared scale: NVFP4 (arXiv:2509.25149) and the microscaling formats (arXiv:2310.10537).

A block's scale is by default the one that maps its largest magnitude to the largest code: to the nearest E4M3 number
for NVFP4, to the next power of two (RCEIL) for E8M0. Neither is the best: E2M1 is coarse at its upper end, so a block
may gain from a largest value that saturates, or that lands on 4 instead of 6. `search_scales` tries the stored scales
around that one, all that can win, by the squared error or by the error weighted with the inputs' second moments.

The divisor of NVFP4's scales is a power of two here. Scales then keep the same mantissas as with any other (E4M3 has 17
octaves, a matrix uses few), every weight is exact in bfloat16, and up to an octave is left above the largest block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.formats import e8m0, fp4, fp8
from compress.types import E2M1, FP8_HIGHEST, BlockFloatScheme, QuantizedTensor

SMALLEST_E4M3 = 2.0**-9
LARGEST_EXPONENT = 100  # of a divisor: beyond, its quotients with scales leave float32
# Places among E4M3's numbers, of which eight make an octave: from 0.5 to 1.6 of the covering scale, and among E8M0's.
E4M3_PLACES = tuple(range(-8, 7))
E8M0_PLACES = (-1, 0, 1)


def divisor(highest: float, scheme: BlockFloatScheme) -> Tensor | None:
    """What divides the scales of a matrix up to `highest`, (1,) float32; None for E8M0."""
    if not scheme.spans_matrix:
        return None
    if not highest > 0:
        return torch.ones(1)
    exponent = math.floor(math.log2(FP8_HIGHEST * E2M1[-1] / highest))
    return torch.tensor([2.0 ** max(-LARGEST_EXPONENT, min(LARGEST_EXPONENT, exponent))])


def steps(scale: Tensor, divided: Tensor | None) -> Tensor:
    """What codes are multiplied by, float32, of stored scales."""
    return e8m0.decode(scale) if divided is None else scale.float() / divided


def covering_scales(weight: Tensor, scheme: BlockFloatScheme, divided: Tensor | None) -> Tensor:
    """Stored scales (out, groups) whose largest code stands for each block's largest magnitude. weight: (out, in)."""
    wanted = _blocks(weight, scheme).abs().amax(-1) / scheme.highest
    if divided is None:
        return e8m0.covering(wanted)
    return fp8.encode((wanted * divided).clamp_(min=SMALLEST_E4M3))


def search_scales(
    weight: Tensor, scheme: BlockFloatScheme, divided: Tensor | None, importance: Tensor | None = None
) -> Tensor:
    """Stored scales (out, groups) of the least rounding error.

    Args:
        weight: (out, in) float32.
        importance: (groups, group_size, group_size) float32, the quadratic form by which a block's error counts; None
            counts squared error.
    """
    blocks, covering = _blocks(weight, scheme), covering_scales(weight, scheme, divided)
    places = E4M3_PLACES if scheme.spans_matrix else E8M0_PLACES
    # The largest finite byte of E4M3 is 126; its bytes and E8M0's are in the order of their numbers.
    lowest, largest = (1, 126) if scheme.spans_matrix else (0, e8m0.LARGEST)
    start = covering.view(torch.uint8).int()
    best, least = start, torch.full(covering.shape, torch.inf)
    for place in sorted(places, key=abs):  # of equal errors the one nearest to the covering scale stays
        candidate = (start + place).clamp_(lowest, largest)
        step = steps(candidate.to(torch.uint8).view(covering.dtype), divided).unsqueeze(-1)
        loss = _loss(nearest(blocks / step, scheme).mul_(step).sub_(blocks), importance)
        better = loss < least
        best, least = torch.where(better, candidate, best), torch.where(better, loss, least)
    return best.to(torch.uint8).view(covering.dtype)


def nearest(values: Tensor, scheme: BlockFloatScheme) -> Tensor:
    """The nearest numbers of the codes, float32."""
    return fp4.nearest(values) if scheme.bits == 4 else fp8.encode(values).float()


def encode(values: Tensor, scale: Tensor, divided: Tensor | None, scheme: BlockFloatScheme) -> QuantizedTensor:
    """The weight that rounds `values` (out, in) float32 to the nearest on stored scales."""
    scaled = (_blocks(values, scheme) / steps(scale, divided).unsqueeze(-1)).flatten(1)
    codes = fp4.encode(scaled) if scheme.bits == 4 else fp8.encode(scaled)
    return QuantizedTensor(codes, scale, None, scheme, divided)


def transform(
    weight: Tensor,
    scheme: BlockFloatScheme,
    search: bool,
    highest: float | None = None,
    importance: Tensor | None = None,
) -> QuantizedTensor:
    """Quantises rows (out, in) float32 of one weight.

    highest: the largest magnitude of the whole matrix, and of those that engines load with it; that of the rows if
    None. search, importance: as for `search_scales`.
    """
    divided = divisor(float(weight.abs().amax()) if highest is None else highest, scheme)
    covering = covering_scales(weight, scheme, divided)
    scale = search_scales(weight, scheme, divided, importance) if search else covering
    return encode(weight, scale, divided, scheme)


def _blocks(weight: Tensor, scheme: BlockFloatScheme) -> Tensor:
    return weight.unflatten(1, (-1, scheme.group_size))


def _loss(error: Tensor, importance: Tensor | None) -> Tensor:
    """error (out, groups, size) -> (out, groups)."""
    if importance is None:
        return error.square().sum(-1)
    weighted = torch.bmm(error.transpose(0, 1), importance).transpose(0, 1)
    return (weighted * error).sum(-1)
