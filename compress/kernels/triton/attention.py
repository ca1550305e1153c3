"""Attention of many tokens over themselves and what came before: tiles with a running softmax (arXiv 2205.14135)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.triton.decode import dot, rounded_to

_BLOCK_QUERIES, _BLOCK_KEYS = 64, 32


@triton.jit
def capped(scores, SOFTCAP: tl.constexpr):
    """softcap * tanh(scores / softcap); 0 leaves scores as they are."""
    if SOFTCAP > 0:
        return SOFTCAP * (1.0 - 2.0 / (tl.exp(scores * (2.0 / SOFTCAP)) + 1.0))
    else:
        return scores


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    queries,
    keys,
    heads,
    kv_heads,
    scale,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """out (batch, queries, heads, dim); a program per block of queries and head; the last query sees all keys."""
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    position = query + keys - queries
    lane = tl.arange(0, SPAN)
    inside = (query < queries)[:, None] & (lane < DIM)[None, :]
    q_row = (batch * heads + head).to(tl.int64) * queries
    q = tl.load(q_ptr + (q_row + query)[:, None] * DIM + lane[None, :], mask=inside, other=0.0)
    kv_row = (batch * kv_heads + head // (heads // kv_heads)).to(tl.int64) * keys
    most = tl.full((BLOCK_QUERIES,), -1.0e30, tl.float32)
    weight = tl.zeros((BLOCK_QUERIES,), tl.float32)
    total = tl.zeros((BLOCK_QUERIES, SPAN), tl.float32)
    lowest = tl.program_id(0) * BLOCK_QUERIES + keys - queries
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    for start in range(begin, tl.minimum(lowest + BLOCK_QUERIES, keys), BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        held = (key < keys)[:, None] & (lane < DIM)[None, :]
        at = (kv_row + key)[:, None] * DIM + lane[None, :]
        k = tl.load(k_ptr + at, mask=held, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)) * scale
        scores = capped(scores, SOFTCAP)
        seen = (key[None, :] <= position[:, None]) & (key < keys)[None, :]
        if WINDOW > 0:
            seen = seen & (position[:, None] - key[None, :] < WINDOW)
        scores = tl.where(seen, scores * 1.4426950408889634, -1.0e30)
        now = tl.maximum(most, tl.max(scores, axis=1))
        share = tl.where(seen, tl.exp2(scores - now[:, None]), 0.0)
        shrink = tl.exp2(most - now)
        weight = weight * shrink + tl.sum(share, axis=1)
        v = tl.load(v_ptr + at, mask=held, other=0.0)
        total = dot(rounded_to(share, v.dtype), v, total * shrink[:, None])
        most = now
    result = total / tl.where(weight == 0, 1.0, weight)[:, None]
    out_row = ((batch * queries + query).to(tl.int64) * heads + head)[:, None] * DIM
    tl.store(out_ptr + out_row + lane[None, :], rounded_to(result, out_ptr.dtype.element_ty), mask=inside)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """softmax(softcap(scale * q k^T)) v of each query over the keys up to its own: (batch, queries, heads, dim).

    query (batch, heads, queries, dim); key, value (batch, kv_heads, keys, dim), kv_heads a divisor of heads and the
    last query at the last key; one dtype. window: positions that a query sees, its own among them; 0 for all.
    Scores and sums are float32; shares are rounded to the values' dtype.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    if heads % kv_heads or keys < queries or key.dtype != query.dtype or value.shape != key.shape:
        raise ValueError(f"queries {tuple(query.shape)} do not fit keys {tuple(key.shape)}")
    out = torch.empty(batch, queries, heads, dim, dtype=query.dtype, device=query.device)
    span = max(triton.next_power_of_2(dim), 16)
    grid = (triton.cdiv(queries, _BLOCK_QUERIES), batch * heads)
    attention_kernel[grid](
        query.contiguous(), key.contiguous(), value.contiguous(), out, queries, keys, heads, kv_heads, scale,
        WINDOW=window, SOFTCAP=softcap, DIM=dim, SPAN=span, BLOCK_QUERIES=_BLOCK_QUERIES, BLOCK_KEYS=_BLOCK_KEYS,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
