"""Attention of many tokens of a sequence over its pages: tiles with a running softmax.

Keys and values of the tokens themselves are in the pages already, kept as all others are, so that a prompt in chunks
meets the same numbers as a whole one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.triton.cache import PAGE, Cache, heads_together, page_of
from compress.kernels.triton.decode import rounded_to
from compress.kernels.triton.softmax import add_page, launch_of

BLOCK_QUERIES = 64
"""Tokens of one entry of `blocks` at most; programs take them all, or fewer where registers would not hold them."""


@triton.jit(do_not_specialize=["table_width"])
def attention_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    tables_ptr,
    blocks_ptr,
    out_ptr,
    heads,
    kv_heads,
    q_stride,
    table_width,
    scale,
    KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    SPAN: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    """out (tokens, heads, dim); a program per block (table, first token, tokens, first position), head, and part of
    the block's tokens."""
    block, head, skipped = blocks_ptr + tl.program_id(0) * 4, tl.program_id(1), tl.program_id(2) * BLOCK_QUERIES
    sequence, first = tl.load(block).to(tl.int64), tl.load(block + 1).to(tl.int64) + skipped
    count, start = tl.minimum(tl.load(block + 2) - skipped, BLOCK_QUERIES), tl.load(block + 3) + skipped
    if count <= 0:
        return
    number, lane = tl.arange(0, BLOCK_QUERIES), tl.arange(0, SPAN)
    position = start + number
    inside = (number < count)[:, None] & (lane < DIM)[None, :]
    q_at = (first + number)[:, None] * q_stride + head * DIM + lane[None, :]
    q = tl.load(q_ptr + q_at, mask=inside, other=0.0)
    kv_head = head // (heads // kv_heads)
    most = tl.full((BLOCK_QUERIES,), -1.0e30, tl.float32)
    weight = tl.zeros((BLOCK_QUERIES,), tl.float32)
    total = tl.zeros((BLOCK_QUERIES, SPAN), tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(start - WINDOW + 1, 0) // PAGE
    for number_of_page in range(begin, (start + count + PAGE - 1) // PAGE):
        page = tl.load(tables_ptr + sequence * table_width + number_of_page).to(tl.int64)
        place = tl.arange(0, PAGE)
        key = number_of_page * PAGE + place
        slot = (page * kv_heads + kv_head) * PAGE + place
        k, v, factor = page_of(
            keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, slot, key < start + count, lane, q.dtype, KIND, DIM
        )
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (position[:, None] - key[None, :] < WINDOW)
        most, weight, total = add_page(q, k, v, factor * scale, seen, most, weight, total, SOFTCAP)
    result = total / tl.where(weight == 0, 1.0, weight)[:, None]
    out_at = ((first + number)[:, None] * heads + head) * DIM + lane[None, :]
    tl.store(out_ptr + out_at, rounded_to(result, out_ptr.dtype.element_ty), mask=inside)


def chunk_attention(
    query: Tensor,
    cache: Cache,
    tables: Tensor,
    blocks: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(softcap(scale * q k^T)) v of each token over its sequence up to itself: (tokens, heads, dim).

    query (tokens, heads, dim), tokens any distance apart; tables (sequences, width) int32, contiguous; blocks (n, 4)
    int32: row of `tables`, first token in `query`, how many (BLOCK_QUERIES at most), position of the first. Rows of the
    result that no block has stay as they are. window: positions that a token sees, its own among them; 0 for all.
    Scores and sums are float32; shares are rounded to the dtype of the query. out: where the result goes, if given.
    """
    query = heads_together(query)
    tokens, heads, dim = query.shape
    if out is None:
        out = torch.empty(tokens, heads, dim, dtype=query.dtype, device=query.device)
    queries, span = queries_of(query.dtype, dim), max(triton.next_power_of_2(dim), 16)
    attention_kernel[(blocks.shape[0], heads, BLOCK_QUERIES // queries)](
        query, cache.keys, cache.values, cache.key_scale, cache.value_scale, tables, blocks, out,
        heads, cache.keys.shape[1], query.stride(0), tables.shape[1], scale,
        KIND=cache.kind, WINDOW=window, SOFTCAP=softcap, DIM=dim, SPAN=span,
        PAGE=PAGE, BLOCK_QUERIES=queries, **launch_of(query.dtype, dim),
    )  # fmt: skip
    return out


def queries_of(dtype: torch.dtype, dim: int) -> int:
    """Tokens of a program: their sums are float32 in registers, and so are float32 inputs, which tensor cores leave."""
    if dtype == torch.float32:
        return 16
    return BLOCK_QUERIES if dim <= 128 else BLOCK_QUERIES // 2
