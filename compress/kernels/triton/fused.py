"""What stands between the products of a decoder, one pass over memory each: RMSNorm, rotary, gates."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.triton.decode import rounded_to

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]
_BLOCK = 1024


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, width, epsilon, OFFSET: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """A program per token: x and the residual, which the sum replaces, over its root mean square, times the weight."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, SPAN)
    inside = at < width
    x = tl.load(x_ptr + token * width + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + token * width + at, mask=inside, other=0.0).to(tl.float32)
        stored = rounded_to(x, residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + token * width + at, stored, mask=inside)
        x = stored.to(tl.float32)
    size = tl.rsqrt(tl.sum(x * x, axis=0) / width + epsilon)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32) + OFFSET
    tl.store(out_ptr + token * width + at, rounded_to(x * size * weight, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, heads, HALF: tl.constexpr, SPAN: tl.constexpr):
    """A program per token and head: (a, b) halves become (a cos - b sin, b cos + a sin)."""
    place = tl.program_id(0).to(tl.int64)
    token, at = place // heads, tl.arange(0, SPAN)
    inside = at < HALF
    a = tl.load(x_ptr + place * 2 * HALF + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + place * 2 * HALF + HALF + at, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + at, mask=inside, other=0.0)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + place * 2 * HALF + at, rounded_to(a * cos - b * sin, dtype), mask=inside)
    tl.store(out_ptr + place * 2 * HALF + HALF + at, rounded_to(b * cos + a * sin, dtype), mask=inside)


@triton.jit(do_not_specialize=["size"])
def gate_kernel(gate_ptr, up_ptr, out_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out = activation(gate) * up, elementwise."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))
    tl.store(out_ptr + at, rounded_to(gate * up, out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None, offset: float = 0.0) -> Tensor:
    """x (..., width) over its root mean square, times weight + offset (1 for Gemma), in the dtype of x; sums float32.

    residual, contiguous and of x's shape, is added first and replaced by the sum.
    """
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    span = triton.next_power_of_2(width)
    norm_kernel[(x.numel() // width,)](
        x, residual, weight, out, width, epsilon, OFFSET=offset, SPAN=span, num_warps=min(max(span // 512, 1), 16)
    )
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (tokens, heads, dim) turned by the angles of cos and sin (tokens, dim / 2) float32, halves being the pairs."""
    x = x.contiguous()
    out, half = torch.empty_like(x), x.shape[-1] // 2
    rotary_kernel[(x.shape[0] * x.shape[1],)](
        x, cos.contiguous(), sin.contiguous(), out, x.shape[1],
        HALF=half, SPAN=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """activation(gate) * up: SwiGLU, or GeGLU with either GELU; in the dtype of gate."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    gate_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](
        gate, up, out, gate.numel(), ACTIVATION=activation, BLOCK=_BLOCK
    )  # fmt: skip
    return out
