"""Inputs rounded to 8 bits as a scheme says: int8, or FP8 E4M3 as bytes, with the scale of each token or group."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def whole(value):
    """The nearest whole number, ties to even, of float32 below 2^22."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def e4m3_byte(value):
    """The nearest FP8 E4M3 code of float32, ties to even; what lies outside the range saturates."""
    size = tl.minimum(tl.abs(value), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    nearest = tl.where(size < 0.015625, whole(size * 512.0) * 0.001953125, normal)
    half = (nearest * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return ((half >> 7) & 0x7F) | sign


@triton.jit
def round_kernel(
    x_ptr, static_ptr, codes_ptr, scale_ptr, columns, group, STEPS: tl.constexpr, FP8: tl.constexpr, SPAN: tl.constexpr
):
    """codes (tokens, columns) and scale (tokens, columns / group) of x; `static_ptr`, if given, is the one scale.

    A program takes one token's group; SPAN is the power of two that covers it.
    """
    token, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, SPAN)
    column = number * group + at
    inside = (at < group) & (column < columns)
    value = tl.load(x_ptr + token * columns + column, mask=inside, other=0.0).to(tl.float32)
    if static_ptr is not None:
        scale = tl.load(static_ptr).to(tl.float32)
    else:
        scale = tl.div_rn(tl.max(tl.abs(value), axis=0), STEPS)
        scale = tl.where(scale == 0, 1.1920928955078125e-07, scale)
    tl.store(scale_ptr + token * tl.num_programs(1) + number, scale)
    value = tl.div_rn(value, scale)
    if FP8:
        tl.store(codes_ptr + token * columns + column, e4m3_byte(value).to(tl.uint8), mask=inside)
    else:
        code = tl.minimum(tl.maximum(whole(value), -128.0), 127.0)
        tl.store(codes_ptr + token * columns + column, code.to(tl.int8), mask=inside)
