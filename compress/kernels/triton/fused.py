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
def turn_kernel(
    x_ptr, cos_ptr, sin_ptr, norms_ptr, stride, heads, epsilon,
    OFFSET: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A program per token and head, in place: halves (a, b) become (a cos - b sin, b cos + a sin).

    Before that they are normed as a head, where there are norms (2, DIM): of the first `heads`, and of others.
    """
    token, head, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, SPAN)
    inside = at < HALF
    here = x_ptr + token * stride + head * DIM + at
    dtype = x_ptr.dtype.element_ty
    a = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(here + HALF, mask=inside, other=0.0).to(tl.float32)
    if norms_ptr is not None:
        size = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / DIM + epsilon)
        own = norms_ptr + (head >= heads).to(tl.int32) * DIM + at
        a *= size * (tl.load(own, mask=inside, other=0.0).to(tl.float32) + OFFSET)
        b *= size * (tl.load(own + HALF, mask=inside, other=0.0).to(tl.float32) + OFFSET)
        a, b = rounded_to(a, dtype).to(tl.float32), rounded_to(b, dtype).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + at, mask=inside, other=0.0)
    tl.store(here, rounded_to(a * cos - b * sin, dtype), mask=inside)
    tl.store(here + HALF, rounded_to(b * cos + a * sin, dtype), mask=inside)


@triton.jit
def gate_kernel(
    gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = activation(gate) * up; a program per token and block of its numbers."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_ptr + token * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + token * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))
    tl.store(out_ptr + token * width + at, rounded_to(gate * up, out_ptr.dtype.element_ty), mask=inside)


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


def turn_heads(
    mixed: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    norms: Tensor | None = None,
    epsilon: float = 0.0,
    offset: float = 0.0,
) -> None:
    """Turns queries and keys of mixed (tokens, heads + 2 kv_heads, dim), in place; values, which are last, stay.

    cos, sin (tokens, half) float32, contiguous: number i of a head's first 2 * half goes with number i + half. norms:
    (2, dim), of queries and of keys, which are normed before that, head by head, with weight + offset; 2 * half is dim
    then. ValueError where these do not fit.
    """
    tokens, _, dim = mixed.shape
    half = cos.shape[1]
    if not mixed.is_contiguous() or 2 * half > dim or (norms is not None and 2 * half != dim):
        raise ValueError(f"{half} angles do not fit {tuple(mixed.shape)}")
    turn_kernel[(tokens, heads + kv_heads)](
        mixed, cos, sin, norms, mixed.stride(0), heads, epsilon,
        OFFSET=offset, DIM=dim, HALF=half, SPAN=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """activation(gate) * up: SwiGLU, or GeGLU with either GELU; (tokens, width) in the dtype of gate.

    gate, up (tokens, width): tokens may lie any distance apart.
    """
    tokens, width = gate.shape
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    out = torch.empty(tokens, width, dtype=gate.dtype, device=gate.device)
    gate_kernel[(tokens, triton.cdiv(width, _BLOCK))](
        gate, up, out, width, gate.stride(0), up.stride(0), ACTIVATION=activation, BLOCK=_BLOCK
    )
    return out
