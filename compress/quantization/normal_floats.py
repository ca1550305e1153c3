"""NF4 weights (Dettmers et al., arXiv:2305.14314, section 3): 4-bit quantiles of a normal distribution, blocks of 64.

A block's scale is its largest magnitude, or where it is searched the one of least squared error. Scales are quantised
too: less their mean, in 8 bits, with a range for every 256 of them (the paper's double quantisation). Codes are chosen
for the scales that come out of that, where the bitsandbytes package keeps those it chose before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats.dynamic_codes import dynamic_table, nearest
from compress.types import NF4, SCALES_PER_RANGE, NestedScales, NormalFloatScheme, QuantizedTensor

# Shares of the largest magnitude: below one it saturates, above it lands on the last but one of the table's numbers.
SHARES = tuple(place / 40 for place in range(26, 59))
PLACES = (0, -1, 1, -2, 2)
"""Stored scales that are tried around the nearest to the best of `SHARES`."""


def transform(weight: Tensor, scheme: NormalFloatScheme, dtype: torch.dtype, search: bool) -> QuantizedTensor:
    """Quantises one whole weight (out, in) float32, which decodes into `dtype`.

    search: choose scales by the least squared error, first as they are, then among those that can be stored.
    """
    blocks = weight.unflatten(1, (-1, scheme.group_size))
    wanted = blocks.abs().amax(-1)
    if search:
        wanted = _best_shares(blocks, wanted)
    nested = nest(wanted, dtype)
    codes = codes_of(wanted, nested)
    if search:
        codes = _best_codes(blocks, codes, nested)
    index = _index(blocks, nested.decode(codes)).to(torch.uint8)
    return QuantizedTensor(index.flatten(1), codes, None, scheme, nested=nested)


def nest(scale: Tensor, dtype: torch.dtype) -> NestedScales:
    """What quantises scales (out, groups) float32: their mean, and the ranges around it."""
    middle = scale.mean(dtype=torch.float64).float().reshape(1)
    apart = (scale - middle).flatten().abs()
    padded = torch.nn.functional.pad(apart, (0, -len(apart) % SCALES_PER_RANGE))
    return NestedScales(dynamic_table(), padded.unflatten(0, (-1, SCALES_PER_RANGE)).amax(1), middle, dtype)


def codes_of(scale: Tensor, nested: NestedScales) -> Tensor:
    """The nearest codes uint8 of scales (out, groups) float32."""
    ranges = nested.spread(scale.shape)
    share = (scale - nested.middle) / torch.where(ranges == 0, 1.0, ranges)
    return nearest(share, nested.table).to(torch.uint8)


def _best_shares(blocks: Tensor, highest: Tensor) -> Tensor:
    best, least = highest, _loss(blocks, highest)
    for share in SHARES:
        scale = highest * share
        loss = _loss(blocks, scale)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best


def _best_codes(blocks: Tensor, start: Tensor, nested: NestedScales) -> Tensor:
    best, least = start.int(), torch.full(start.shape, torch.inf)
    for place in PLACES:
        codes = (start.int() + place).clamp_(0, len(nested.table) - 1)
        loss = _loss(blocks, nested.decode(codes))
        best, least = torch.where(loss < least, codes, best), torch.minimum(loss, least)
    return best.to(torch.uint8)


def _index(blocks: Tensor, scale: Tensor) -> Tensor:
    """The nearest of NF4's numbers, by index. scale: (out, groups); one of zero makes zeros."""
    step = torch.where(scale == 0, torch.inf, scale).unsqueeze(-1)
    return nearest(blocks / step, torch.tensor(NF4))


def _loss(blocks: Tensor, scale: Tensor) -> Tensor:
    values = torch.tensor(NF4)[_index(blocks, scale)] * scale.unsqueeze(-1)
    return (values - blocks).square_().sum(-1)
