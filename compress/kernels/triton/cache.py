"""Keys and values in pages, kept as they are, in int8, int4 or FP8: what is written, and how a page is read.

int8 has a scale per token and head. int4 has 16 steps from the smallest value of a token and head to its largest; the
codes of a head's second half lie above those of its first. FP8 E4M3 (as bytes) has one calibrated scale for keys and
one for values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.triton.decode import e4m3, rounded_to
from compress.kernels.triton.rounding import e4m3_byte, whole

PAGE = 32
CacheKind = Literal["plain", "int8", "int4", "fp8"]
CODED: tuple[CacheKind, ...] = ("int8", "int4", "fp8")
"""Kinds that hold codes, whatever the model's dtype."""


@dataclass(frozen=True, eq=False, slots=True)
class Cache:
    """keys, values (pages, kv_heads, PAGE, dim): a floating dtype, int8, or uint8 for FP8; of int4 dim / 2 uint8.

    key_scale, value_scale: (pages, kv_heads, PAGE) float32 for int8, (pages, kv_heads, PAGE, 2) bfloat16 for int4, the
    step and the smallest value, (1,) float32 for FP8, None for the rest.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    kind: CacheKind

    @classmethod
    def empty(
        cls, pages: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device | str,
        kind: CacheKind = "plain", scales: tuple[Tensor, Tensor] | None = None,
    ) -> Cache:  # fmt: skip
        """Room for so many pages. `scales`: of keys and values, (1,) each, which FP8 needs; dim is even for int4.

        ValueError for FP8 without scales.
        """
        stored = {"plain": dtype, "int8": torch.int8, "int4": torch.uint8, "fp8": torch.uint8}[kind]
        size = pages, kv_heads, PAGE
        width = dim // 2 if kind == "int4" else dim
        keys, values = torch.zeros(2, *size, width, dtype=stored, device=device).unbind(0)
        if kind == "int8":
            scales = torch.zeros(2, *size, dtype=torch.float32, device=device).unbind(0)  # type: ignore
        if kind == "int4":
            scales = torch.zeros(2, *size, 2, dtype=torch.bfloat16, device=device).unbind(0)  # type: ignore
        if kind == "fp8" and scales is None:
            raise ValueError("an FP8 cache needs calibrated scales")
        of_keys, of_values = (None, None) if kind == "plain" or scales is None else scales
        return cls(keys, values, of_keys, of_values, kind)

    @property
    def token_bytes(self) -> int:
        """Bytes that the keys and values of one token take."""
        parts = (self.keys, self.values, *((self.key_scale, self.value_scale) if self.kind in ("int8", "int4") else ()))
        held = sum(part.numel() * part.element_size() for part in parts if part is not None)
        return held // (self.keys.shape[0] * PAGE)


@triton.jit
def write_int4(x_ptr, codes_ptr, steps_ptr, place, lane, there, HALF: tl.constexpr):
    """One head (2 HALF,) as HALF bytes, and its step and smallest value, which are rounded before codes are found."""
    inside = (lane < HALF) & there
    low = tl.load(x_ptr + lane, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + HALF + lane, mask=inside, other=0.0).to(tl.float32)
    least = tl.min(tl.where(lane < HALF, tl.minimum(low, high), float("inf")), axis=0)
    most = tl.max(tl.where(lane < HALF, tl.maximum(low, high), float("-inf")), axis=0)
    step = rounded_to(tl.maximum((most - least) / 15.0, 1.0e-12), tl.bfloat16)
    least = rounded_to(least, tl.bfloat16)
    tl.store(steps_ptr + place * 2, step, mask=there)
    tl.store(steps_ptr + place * 2 + 1, least, mask=there)
    low = tl.minimum(tl.maximum(whole(tl.div_rn(low - least.to(tl.float32), step.to(tl.float32))), 0.0), 15.0)
    high = tl.minimum(tl.maximum(whole(tl.div_rn(high - least.to(tl.float32), step.to(tl.float32))), 0.0), 15.0)
    tl.store(codes_ptr + place * HALF + lane, (low.to(tl.int32) | (high.to(tl.int32) << 4)).to(tl.uint8), mask=inside)


@triton.jit
def int4_page(codes_ptr, steps_ptr, slot, held, lane, inside, dtype: tl.constexpr, HALF: tl.constexpr):
    """Numbers (places, lanes) in dtype of what `write_int4` wrote."""
    codes = tl.load(codes_ptr + slot[:, None] * HALF + (lane % HALF)[None, :], mask=inside, other=0).to(tl.int32)
    step = tl.load(steps_ptr + slot * 2, mask=held, other=0.0).to(tl.float32)
    least = tl.load(steps_ptr + slot * 2 + 1, mask=held, other=0.0).to(tl.float32)
    code = (codes >> (lane // HALF * 4)[None, :]) & 15
    return rounded_to(tl.where(inside, code.to(tl.float32) * step[:, None] + least[:, None], 0.0), dtype)


@triton.jit
def write_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, slots_ptr, k_stride, v_stride, kv_heads,
    KIND: tl.constexpr, DIM: tl.constexpr, SPAN: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A program per token and head: its key and value into slot page * PAGE + place; a negative slot writes nothing."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    lane = tl.arange(0, SPAN)
    inside = (lane < DIM) & (slot >= 0)
    place = (slot // PAGE * kv_heads + head) * PAGE + slot % PAGE
    if KIND == "int4":
        write_int4(k_ptr + token * k_stride + head * DIM, keys_ptr, key_scale_ptr, place, lane, slot >= 0, DIM // 2)
        write_int4(v_ptr + token * v_stride + head * DIM, values_ptr, value_scale_ptr, place, lane, slot >= 0, DIM // 2)
        return
    k = tl.load(k_ptr + token * k_stride + head * DIM + lane, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + token * v_stride + head * DIM + lane, mask=inside, other=0.0).to(tl.float32)
    if KIND == "int8":
        key_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(k), axis=0), 127.0), 1.0e-12)
        value_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(v), axis=0), 127.0), 1.0e-12)
        tl.store(key_scale_ptr + place, key_scale, mask=slot >= 0)
        tl.store(value_scale_ptr + place, value_scale, mask=slot >= 0)
        tl.store(keys_ptr + place * DIM + lane, whole(tl.div_rn(k, key_scale)).to(tl.int8), mask=inside)
        tl.store(values_ptr + place * DIM + lane, whole(tl.div_rn(v, value_scale)).to(tl.int8), mask=inside)
    elif KIND == "fp8":
        k = e4m3_byte(tl.div_rn(k, tl.load(key_scale_ptr)))
        v = e4m3_byte(tl.div_rn(v, tl.load(value_scale_ptr)))
        tl.store(keys_ptr + place * DIM + lane, k.to(tl.uint8), mask=inside)
        tl.store(values_ptr + place * DIM + lane, v.to(tl.uint8), mask=inside)
    else:
        tl.store(keys_ptr + place * DIM + lane, rounded_to(k, keys_ptr.dtype.element_ty), mask=inside)
        tl.store(values_ptr + place * DIM + lane, rounded_to(v, values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def page_of(
    keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, slot, held, lane,
    dtype: tl.constexpr, KIND: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """(keys, values (places, lanes) in dtype, what scores with the keys are multiplied by (places,) float32).

    slot (places,) int64: (page * kv_heads + head) * PAGE + place; held: whether there is a token.
    """
    inside = held[:, None] & (lane < DIM)[None, :]
    factor = tl.full(slot.shape, 1.0, tl.float32)
    if KIND == "int4":
        k = int4_page(keys_ptr, key_scale_ptr, slot, held, lane, inside, dtype, DIM // 2)
        v = int4_page(values_ptr, value_scale_ptr, slot, held, lane, inside, dtype, DIM // 2)
        return k, v, factor
    k = tl.load(keys_ptr + slot[:, None] * DIM + lane[None, :], mask=inside, other=0)
    v = tl.load(values_ptr + slot[:, None] * DIM + lane[None, :], mask=inside, other=0)
    if KIND == "int8":
        factor = tl.load(key_scale_ptr + slot, mask=held, other=0.0)
        v = v.to(tl.float32) * tl.load(value_scale_ptr + slot, mask=held, other=0.0)[:, None]
    elif KIND == "fp8":
        factor *= tl.load(key_scale_ptr)
        k, v = e4m3(k), e4m3(v) * tl.load(value_scale_ptr)
    return rounded_to(k.to(tl.float32), dtype), rounded_to(v.to(tl.float32), dtype), factor


def write(cache: Cache, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Keeps key and value (tokens, kv_heads, dim) at slots (tokens,) int32: page * PAGE + place, negative for none.

    Tokens may lie any distance apart; a token's heads lie together.
    """
    tokens, kv_heads, dim = key.shape
    key, value = heads_together(key), heads_together(value)
    write_kernel[(tokens, kv_heads)](
        key, value, cache.keys, cache.values, cache.key_scale, cache.value_scale, slots,
        key.stride(0), value.stride(0), kv_heads,
        KIND=cache.kind, DIM=dim, SPAN=triton.next_power_of_2(dim), PAGE=PAGE, num_warps=1,
    )  # fmt: skip


def heads_together(x: Tensor) -> Tensor:
    """x (tokens, heads, dim) with the heads of a token side by side, copied if they are not."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
