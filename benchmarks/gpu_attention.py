"""Parity of attention on a GPU at a model's sizes: both kernels over every kind of cache against float64.

What they are compared with is computed by torch from the numbers that the cache holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_products import Save
from benchmarks.gpu_shapes import Shape
from benchmarks.gpu_timing import Clock
from compress.kernels.triton.attention import BLOCK_QUERIES, chunk_attention
from compress.kernels.triton.cache import PAGE, Cache, CacheKind, write
from compress.kernels.triton.paged import paged_attention

KINDS: tuple[CacheKind, ...] = ("plain", "int8", "int4", "fp8")


def parity(shape: Shape, clock: Clock, found: dict[str, Any], save: Save) -> None:
    """By kind: largest error of a step of single tokens, and of a chunk, over the largest output."""
    lengths, new = ([1, 40], 35) if clock.dry else ([1, 33, 1000, 4096, 3001], 500)
    heads, kv_heads, dim, device = shape.heads, shape.kv_heads, shape.hidden // shape.heads, clock.device
    scale = dim**-0.5
    for kind in KINDS:
        cache, tables = _filled(kind, lengths, kv_heads, dim, device)
        held = [_held(cache, tables[row], length) for row, length in enumerate(lengths)]
        query = 3 * torch.randn(len(lengths), heads, dim, device=device).bfloat16()
        counts = torch.tensor(lengths, dtype=torch.int32, device=device)
        single = paged_attention(query, cache, tables, counts, scale)
        of_single = max(
            _error(single[row], _exact(query[row : row + 1], keys, values, scale)[0])
            for row, (keys, values) in enumerate(held)
        )
        query = 3 * torch.randn(new, heads, dim, device=device).bfloat16()
        blocks = [
            (len(lengths) - 1, at, min(BLOCK_QUERIES, new - at), lengths[-1] - new + at)
            for at in range(0, new, BLOCK_QUERIES)
        ]
        there = torch.tensor(blocks, dtype=torch.int32, device=device)
        chunk = chunk_attention(query, cache, tables, there, scale)
        found[kind] = {"single": of_single, "chunk": _error(chunk, _exact(query, *held[-1], scale))}
        save()


def _filled(kind: CacheKind, lengths: list[int], kv_heads: int, dim: int, device: torch.device) -> tuple[Cache, Tensor]:
    """Sequences of random keys and values in pages in disorder."""
    width = -(-max(lengths) // PAGE)
    tables = torch.randperm(len(lengths) * width, device=device).to(torch.int32).view(len(lengths), width)
    scales = (torch.tensor([0.01], device=device), torch.tensor([0.01], device=device))
    cache = Cache.empty(len(lengths) * width, kv_heads, dim, torch.bfloat16, device, kind, scales)
    for row, length in enumerate(lengths):
        at = torch.arange(length, device=device)
        slots = (tables[row][at // PAGE] * PAGE + at % PAGE).to(torch.int32)
        key, value = torch.randn(2, length, kv_heads, dim, device=device).bfloat16().unbind(0)
        write(cache, key, value, slots)
    return cache, tables


def _held(cache: Cache, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values (kv_heads, length, dim) float64 of a sequence, as the cache's kind says what it holds."""
    found = []
    for codes, scale in ((cache.keys, cache.key_scale), (cache.values, cache.value_scale)):
        pages, steps = codes[table.long()], scale
        if cache.kind == "fp8" and scale is not None:
            numbers = pages.view(torch.float8_e4m3fn).double() * scale.double()
        elif cache.kind == "int8" and scale is not None:
            numbers = pages.double() * scale[table.long()].double().unsqueeze(-1)
        elif cache.kind == "int4" and scale is not None:
            steps = scale[table.long()].double()
            numbers = torch.cat([pages & 15, pages >> 4], -1).double() * steps[..., :1] + steps[..., 1:]
        else:
            numbers = pages.double()
        found.append(numbers.transpose(0, 1).flatten(1, 2)[:, :length])
    return found[0], found[1]


def _exact(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """query (queries, heads, dim), the last of the sequence: (queries, heads, dim) float64."""
    shared = query.shape[1] // keys.shape[0]
    q, k, v = query.double().transpose(0, 1), *(part.repeat_interleave(shared, 0) for part in (keys, values))
    at = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device).unsqueeze(1)
    unseen = at < torch.arange(k.shape[1], device=q.device)
    return ((scale * (q @ k.transpose(1, 2))).masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())
