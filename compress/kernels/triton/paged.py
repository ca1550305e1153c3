"""Attention of one new token per sequence over keys and values in pages, kept as they are, in int8 or in FP8.

A program takes one sequence, one key head with all query heads that share it, and a share of the pages; a second kernel
joins the shares. int8 has a scale per token and head, FP8 E4M3 (as bytes) one calibrated scale for keys and one for
values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.triton.attention import capped
from compress.kernels.triton.decode import dot, e4m3, rounded_to
from compress.kernels.triton.rounding import e4m3_byte, whole

PAGE = 32
CacheKind = Literal["plain", "int8", "fp8"]
_PAGES_OF_A_SPLIT = 8


@dataclass(frozen=True, eq=False, slots=True)
class Cache:
    """keys, values (pages, kv_heads, PAGE, dim): a floating dtype, int8, or uint8 for FP8.

    key_scale, value_scale float32: (pages, kv_heads, PAGE) for int8, (1,) for FP8, None for the rest.
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
        """Room for so many pages. `scales`: of keys and values, (1,) each, which FP8 needs. ValueError without them."""
        stored = {"plain": dtype, "int8": torch.int8, "fp8": torch.uint8}[kind]
        keys, values = torch.zeros(2, pages, kv_heads, PAGE, dim, dtype=stored, device=device).unbind(0)
        if kind == "int8":
            scales = torch.zeros(2, pages, kv_heads, PAGE, dtype=torch.float32, device=device).unbind(0)  # type: ignore
        if kind == "fp8" and scales is None:
            raise ValueError("an FP8 cache needs calibrated scales")
        of_keys, of_values = (None, None) if kind == "plain" or scales is None else scales
        return cls(keys, values, of_keys, of_values, kind)


@triton.jit
def write_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, slots_ptr, kv_heads,
    KIND: tl.constexpr, DIM: tl.constexpr, SPAN: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A program per token and head: its key and value into slot page * PAGE + place; a negative slot writes nothing."""
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    lane = tl.arange(0, SPAN)
    inside = (lane < DIM) & (slot >= 0)
    place = (slot // PAGE * kv_heads + head) * PAGE + slot % PAGE
    source = (token.to(tl.int64) * kv_heads + head) * DIM + lane
    k = tl.load(k_ptr + source, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + source, mask=inside, other=0.0).to(tl.float32)
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


@triton.jit(do_not_specialize=["table_width", "splits"])
def paged_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    tables_ptr,
    lengths_ptr,
    out_ptr,
    most_ptr,
    weight_ptr,
    heads,
    kv_heads,
    table_width,
    scale,
    splits,
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    SPAN: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """out (splits, sequences, heads, dim) float32 not yet divided; most, weight (splits, sequences, heads)."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + sequence)
    number, lane = tl.arange(0, BLOCK_HEADS), tl.arange(0, SPAN)
    head = kv_head * SHARED + number
    inside = (number < SHARED)[:, None] & (lane < DIM)[None, :]
    q_at = (sequence.to(tl.int64) * heads + head)[:, None] * DIM + lane[None, :]
    q = tl.load(q_ptr + q_at, mask=inside, other=0.0)
    most = tl.full((BLOCK_HEADS,), -1.0e30, tl.float32)
    weight = tl.zeros((BLOCK_HEADS,), tl.float32)
    total = tl.zeros((BLOCK_HEADS, SPAN), tl.float32)
    pages = (length + PAGE - 1) // PAGE
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // PAGE
    begin = first + split * (pages - first) // splits
    for number_of_page in range(begin, first + (split + 1) * (pages - first) // splits):
        page = tl.load(tables_ptr + sequence.to(tl.int64) * table_width + number_of_page).to(tl.int64)
        place = tl.arange(0, PAGE)
        position = number_of_page * PAGE + place
        slot = (page * kv_heads + kv_head) * PAGE + place
        held = (position < length)[:, None] & (lane < DIM)[None, :]
        k = tl.load(keys_ptr + slot[:, None] * DIM + lane[None, :], mask=held, other=0)
        v = tl.load(values_ptr + slot[:, None] * DIM + lane[None, :], mask=held, other=0)
        factor = tl.full((PAGE,), 1.0, tl.float32)
        if KIND == "int8":
            k, v = rounded_to(k.to(tl.float32), q.dtype), v.to(tl.float32)
            factor = tl.load(key_scale_ptr + slot, mask=position < length, other=0.0)
            v *= tl.load(value_scale_ptr + slot, mask=position < length, other=0.0)[:, None]
        elif KIND == "fp8":
            k, v = rounded_to(e4m3(k), q.dtype), e4m3(v) * tl.load(value_scale_ptr)
            factor *= tl.load(key_scale_ptr)
        scores = dot(q, tl.trans(k.to(q.dtype)), tl.zeros((BLOCK_HEADS, PAGE), tl.float32)) * (factor * scale)[None, :]
        scores = capped(scores, SOFTCAP) * 1.4426950408889634
        seen = position < length
        if WINDOW > 0:
            seen = seen & (position >= length - WINDOW)
        scores = tl.where(seen[None, :], scores, -1.0e30)
        now = tl.maximum(most, tl.max(scores, axis=1))
        share = tl.where(seen[None, :], tl.exp2(scores - now[:, None]), 0.0)
        shrink = tl.exp2(most - now)
        weight = weight * shrink + tl.sum(share, axis=1)
        total = dot(rounded_to(share, q.dtype), rounded_to(v.to(tl.float32), q.dtype), total * shrink[:, None])
        most = now
    row = (split.to(tl.int64) * tl.num_programs(0) + sequence) * heads + head
    tl.store(out_ptr + row[:, None] * DIM + lane[None, :], total, mask=inside)
    tl.store(most_ptr + row, most, mask=number < SHARED)
    tl.store(weight_ptr + row, weight, mask=number < SHARED)


@triton.jit(do_not_specialize=["rows", "splits"])
def join_kernel(part_ptr, most_ptr, weight_ptr, out_ptr, rows, splits, DIM: tl.constexpr, SPAN: tl.constexpr):
    """out (rows, dim) of the shares (splits, rows, dim) of each sequence and head, in order."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, SPAN)
    most = tl.full((), -1.0e30, tl.float32)
    for split in range(splits):
        most = tl.maximum(most, tl.load(most_ptr + split * rows + row))
    total, weight = tl.zeros((SPAN,), tl.float32), tl.zeros((), tl.float32)
    for split in range(splits):
        at = row + split * rows
        share = tl.exp2(tl.load(most_ptr + at) - most)
        weight += share * tl.load(weight_ptr + at)
        total += share * tl.load(part_ptr + at * DIM + lane, mask=lane < DIM, other=0.0)
    tl.store(out_ptr + row * DIM + lane, rounded_to(total / weight, out_ptr.dtype.element_ty), mask=lane < DIM)


def write(cache: Cache, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Keeps key and value (tokens, kv_heads, dim) at slots (tokens,) int32: page * PAGE + place, negative for none."""
    tokens, kv_heads, dim = key.shape
    write_kernel[(tokens, kv_heads)](
        key.contiguous(), value.contiguous(), cache.keys, cache.values, cache.key_scale, cache.value_scale, slots,
        kv_heads, KIND=cache.kind, DIM=dim, SPAN=triton.next_power_of_2(dim), PAGE=PAGE, num_warps=1,
    )  # fmt: skip


def paged_attention(
    query: Tensor,
    cache: Cache,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    splits: int | None = None,
) -> Tensor:
    """Attention of query (sequences, heads, dim) over the pages that tables lists: (sequences, heads, dim).

    tables (sequences, width) int32; lengths (sequences,) int32, tokens of each, the new one among them and 1 at least.
    splits: None takes one for every 8 pages of the width of `tables`, a number that no length changes.
    """
    sequences, heads, dim = query.shape
    kv_heads = cache.keys.shape[1]
    shared = heads // kv_heads
    count = max(1, -(-tables.shape[1] // _PAGES_OF_A_SPLIT)) if splits is None else splits
    part = torch.empty(count, sequences, heads, dim, dtype=torch.float32, device=query.device)
    most, weight = torch.empty(2, count, sequences, heads, dtype=torch.float32, device=query.device).unbind(0)
    span = max(triton.next_power_of_2(dim), 16)
    paged_kernel[(sequences, kv_heads, count)](
        query.contiguous(), cache.keys, cache.values, cache.key_scale, cache.value_scale, tables.contiguous(), lengths,
        part, most, weight, heads, kv_heads, tables.shape[1], scale, count,
        KIND=cache.kind, SHARED=shared, WINDOW=window, SOFTCAP=softcap, DIM=dim, SPAN=span, PAGE=PAGE,
        BLOCK_HEADS=max(triton.next_power_of_2(shared), 16), num_warps=4, num_stages=2,
    )  # fmt: skip
    out = torch.empty_like(query)
    join_kernel[(sequences * heads,)](
        part, most, weight, out, sequences * heads, count, DIM=dim, SPAN=triton.next_power_of_2(dim), num_warps=1
    )
    return out
