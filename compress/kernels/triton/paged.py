"""Attention of one new token per sequence over keys and values in pages.

A program takes one sequence, one key head with all query heads that share it, and a share of the pages; where there are
several shares, a second kernel joins them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.triton.cache import PAGE, Cache, heads_together, page_of
from compress.kernels.triton.configs import units
from compress.kernels.triton.decode import rounded_to
from compress.kernels.triton.softmax import add_page, launch_of

PER_UNIT = 4
"""Programs that a multiprocessor holds at once."""
_PAGES_OF_A_SPLIT = 8


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
    q_stride,
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
    """out (splits, sequences, heads, dim) float32 not yet divided, nothing where a split has no page; most, weight
    (splits, sequences, heads). Without these the one split writes the result, (sequences, heads, dim)."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + sequence)
    number, lane = tl.arange(0, BLOCK_HEADS), tl.arange(0, SPAN)
    head = kv_head * SHARED + number
    inside = (number < SHARED)[:, None] & (lane < DIM)[None, :]
    q_at = sequence.to(tl.int64) * q_stride + head[:, None] * DIM + lane[None, :]
    q = tl.load(q_ptr + q_at, mask=inside, other=0.0)
    most = tl.full((BLOCK_HEADS,), -1.0e30, tl.float32)
    weight = tl.zeros((BLOCK_HEADS,), tl.float32)
    total = tl.zeros((BLOCK_HEADS, SPAN), tl.float32)
    pages = (length + PAGE - 1) // PAGE
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // PAGE
    begin, end = first + split * (pages - first) // splits, first + (split + 1) * (pages - first) // splits
    for number_of_page in range(begin, end):
        page = tl.load(tables_ptr + sequence.to(tl.int64) * table_width + number_of_page).to(tl.int64)
        place = tl.arange(0, PAGE)
        position = number_of_page * PAGE + place
        slot = (page * kv_heads + kv_head) * PAGE + place
        k, v, factor = page_of(
            keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, slot, position < length, lane, q.dtype, KIND, DIM
        )
        seen = position < length
        if WINDOW > 0:
            seen = seen & (position >= length - WINDOW)
        most, weight, total = add_page(q, k, v, factor * scale, seen[None, :], most, weight, total, SOFTCAP)
    row = (split.to(tl.int64) * tl.num_programs(0) + sequence) * heads + head
    if most_ptr is None:
        total = total / weight[:, None]
    else:
        tl.store(most_ptr + row, most, mask=number < SHARED)
        tl.store(weight_ptr + row, weight, mask=number < SHARED)
        inside = inside & (begin < end)
    tl.store(out_ptr + row[:, None] * DIM + lane[None, :], rounded_to(total, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def join_kernel(part_ptr, most_ptr, weight_ptr, out_ptr, rows, splits, DIM: tl.constexpr, SPAN: tl.constexpr):
    """out (rows, dim) of the shares (splits, rows, dim) of each sequence and head, in order; of no weight: not read."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, SPAN)
    most = tl.full((), -1.0e30, tl.float32)
    for split in range(splits):
        most = tl.maximum(most, tl.load(most_ptr + split * rows + row))
    total, weight = tl.zeros((SPAN,), tl.float32), tl.zeros((), tl.float32)
    for split in range(splits):
        at = row + split * rows
        share, own = tl.exp2(tl.load(most_ptr + at) - most), tl.load(weight_ptr + at)
        weight += share * own
        held = tl.where(own > 0, DIM, 0)
        total += share * tl.load(part_ptr + at * DIM + lane, mask=lane < held, other=0.0)
    tl.store(out_ptr + row * DIM + lane, rounded_to(total / weight, out_ptr.dtype.element_ty), mask=lane < DIM)


def paged_attention(
    query: Tensor,
    cache: Cache,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of query (sequences, heads, dim) over the pages that tables lists: (sequences, heads, dim).

    query: tokens may lie any distance apart. tables (sequences, width) int32, contiguous; lengths (sequences,) int32,
    tokens of each, the new one among them and 1 at least. out: where the result goes, if given.
    splits: programs that share a sequence's pages; None: as `splits_of` says, a number that no length changes.
    """
    query = heads_together(query)
    sequences, heads, dim = query.shape
    kv_heads = cache.keys.shape[1]
    shared = heads // kv_heads
    count = splits_of(tables.shape[1], sequences * kv_heads, query.device) if splits is None else splits
    if out is None:
        out = torch.empty(sequences, heads, dim, dtype=query.dtype, device=query.device)
    part, most, weight = out, None, None
    if count > 1:
        part = torch.empty(count, sequences, heads, dim, dtype=torch.float32, device=query.device)
        most, weight = torch.empty(2, count, sequences, heads, dtype=torch.float32, device=query.device).unbind(0)
    span = max(triton.next_power_of_2(dim), 16)
    paged_kernel[(sequences, kv_heads, count)](
        query, cache.keys, cache.values, cache.key_scale, cache.value_scale, tables, lengths,
        part, most, weight, heads, kv_heads, query.stride(0), tables.shape[1], scale, count,
        KIND=cache.kind, SHARED=shared, WINDOW=window, SOFTCAP=softcap, DIM=dim, SPAN=span, PAGE=PAGE,
        BLOCK_HEADS=max(triton.next_power_of_2(shared), 16), **launch_of(query.dtype, dim),
    )  # fmt: skip
    if count > 1:
        join_kernel[(sequences * heads,)](
            part, most, weight, out, sequences * heads, count, DIM=dim, SPAN=triton.next_power_of_2(dim), num_warps=1
        )
    return out


def splits_of(pages: int, programs: int, device: torch.device) -> int:
    """Programs that share the pages of one of `programs` sequences and key heads: one for every 8 pages, where a
    multiprocessor has fewer than 4 of them."""
    return max(1, min(-(-pages // _PAGES_OF_A_SPLIT), PER_UNIT * units(device) // programs))
