"""What kernels share: codes to numbers, scales, and the product of two tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.triton.available import interpreted

# Triton's interpreter keeps bfloat16 as bare bits: it has no product of them, and cuts float32 off to them. What is
# done about it below has the numbers of a GPU, in float32.
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def e4m3(byte):
    """FP8 E4M3 bytes as float32: a half's exponent is one bit wider, so a shift is exact, subnormals too."""
    code = byte.to(tl.int32)
    half = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
    return half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def e2m1(code):
    """FP4 E2M1 codes (sign << 3 | index) as float32."""
    half = ((code & 7) << 9) | ((code & 8) << 12)
    return half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def e8m0(byte):
    """Powers of two as float32; byte 0 is 2^-127, which is subnormal."""
    exponent = byte.to(tl.int32)
    return tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(stored, divisor_ptr, SCALE_KIND: tl.constexpr):
    """Stored scales as float32."""
    if SCALE_KIND == "e4m3":
        return tl.div_rn(e4m3(stored), tl.load(divisor_ptr))
    elif SCALE_KIND == "e8m0":
        return e8m0(stored)
    else:
        return stored.to(tl.float32)


@triton.jit
def scale_index(column, GROUP: tl.constexpr):
    """Which of a row's scales a column has."""
    if GROUP == 0:
        return column * 0
    else:
        return column // GROUP


@triton.jit
def dot(left, right, total):
    """total + left @ right, float32; operands of one dtype, float32 ones without rounding to TF32."""
    if _INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def rounded_to(value, dtype: tl.constexpr):
    """float32 as another floating dtype, to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return value.to(dtype)
