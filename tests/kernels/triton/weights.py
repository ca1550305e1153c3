"""Random quantised weights of every kind, what they stand for in float64, and how far a product may be from that."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.types import BlockFloatScheme, IntScheme, QuantizedTensor, Scheme

EXACT = 1e-5
"""Largest error of float32 products over the outputs' root mean square: the order of some hundred sums."""


def quantized(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    """Random codes over their whole range, NaN left out, on grids of some variety."""
    generator = torch.Generator().manual_seed(rows)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    assert isinstance(scheme, (IntScheme, BlockFloatScheme))
    groups = scheme.groups(columns)
    if isinstance(scheme, IntScheme):
        scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).to(dtype)
        codes = draw(scheme.qmin, scheme.qmax + 1, rows, columns).to(torch.int8)
        zero = None if scheme.symmetric else draw(scheme.qmin, scheme.qmax + 1, rows, groups).to(torch.int8)
        return QuantizedTensor(codes, scale, zero, scheme)
    codes = draw(0, 16, rows, columns).to(torch.uint8)
    if scheme.bits == 8:
        codes = ((draw(0, 127, rows, columns)) | (draw(0, 2, rows, columns) << 7)).to(torch.uint8)
        codes = codes.view(torch.float8_e4m3fn)
    if scheme.scale_type == "e8m0":
        return QuantizedTensor(codes, draw(112, 122, rows, groups).to(torch.uint8), None, scheme)
    scale = draw(1, 127, rows, groups).to(torch.uint8).view(torch.float8_e4m3fn)
    return QuantizedTensor(codes, scale, None, scheme, torch.tensor([300.0]))


def exact(weight: QuantizedTensor) -> Tensor:
    """The weight (rows, columns) float64, nothing rounded but what is stored."""
    scheme, scale = weight.scheme, weight.scale
    if isinstance(scheme, IntScheme):
        codes = weight.codes.double().unflatten(1, (scale.shape[1], -1))
        zero = 0 if weight.zero_point is None else weight.zero_point.double().unsqueeze(-1)
        return ((codes - zero) * scale.double().unsqueeze(-1)).flatten(1)
    assert isinstance(scheme, BlockFloatScheme)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = weight.codes.double() if scheme.bits == 8 else torch.cat([levels, -levels])[weight.codes.int()]
    steps = torch.pow(2.0, scale.double() - 127) if scheme.scale_type == "e8m0" else scale.double()
    steps = steps if weight.divisor is None else steps / weight.divisor.double()
    return (values.unflatten(1, (scale.shape[1], -1)) * steps.unsqueeze(-1)).flatten(1)


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def is_close(found: Tensor, expected: Tensor, lost: float = 0.0) -> bool:
    """Whether outputs are as near to float64 as their dtype lets them be.

    float32: EXACT. Half precision: the result is rounded once, to half a step of itself, and so is each weight where
    tensor cores take it, which two steps of the outputs' root mean square cover: of all, or, where that is larger, of
    those of one row of weights. lost: what sums may lose besides, of the outputs' root mean square.
    """
    error, size = (found.cpu().double() - expected).abs(), expected.square().mean().sqrt()
    if found.dtype == torch.float32:
        return bool((error <= (EXACT + lost) * size).all())
    step = torch.finfo(found.dtype).eps
    of_row = torch.maximum(size, expected.square().mean(0).sqrt())
    return bool((error <= step * (expected.abs() / 2 + 2 * of_row) + lost * size).all())
