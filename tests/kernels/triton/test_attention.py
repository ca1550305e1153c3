"""Tiled and paged attention against plain attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.weights import inputs

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels.triton import paged
from compress.kernels.triton.attention import BLOCK_QUERIES, chunk_attention
from compress.kernels.triton.cache import PAGE, Cache, CacheKind, write
from compress.kernels.triton.paged import paged_attention

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Of the largest output: shares are rounded to the values' dtype."""


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, softcap: float = 0.0) -> Tensor:
    """q (heads, queries, dim), k and v (kv_heads, keys, dim), float64: (queries, heads, dim)."""
    q, k, v = q.double(), *(part.double().repeat_interleave(q.shape[0] // k.shape[0], 0) for part in (k, v))
    scores = scale * (q @ k.transpose(-1, -2))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    at = torch.arange(k.shape[1] - q.shape[1], k.shape[1]).unsqueeze(1) - torch.arange(k.shape[1])
    unseen = (at < 0) | ((at >= window) if window else torch.zeros_like(at, dtype=torch.bool))
    return (scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def draw(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def filled(kind: CacheKind, lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> tuple[
    Cache, Tensor, list[tuple[Tensor, Tensor]]
]:  # fmt: skip
    """A cache with pages in disorder, its tables, and what was written of each sequence."""
    width = -(-max(lengths) // PAGE)
    order = torch.randperm(len(lengths) * width + 1, generator=torch.Generator().manual_seed(0))[: len(lengths) * width]
    tables = order.reshape(len(lengths), width).to(torch.int32)
    scales = (torch.tensor([0.01], device=device), torch.tensor([0.02], device=device)) if kind == "fp8" else None
    cache = Cache.empty(len(lengths) * width + 1, kv_heads, dim, dtype, device, kind, scales)
    written = []
    for number, length in enumerate(lengths):
        key, value = (
            draw(5 + number, length, kv_heads, dim).to(dtype),
            draw(50 + number, length, kv_heads, dim).to(dtype),
        )
        at = torch.arange(length)
        slots = tables[number][at // PAGE] * PAGE + at % PAGE
        write(cache, key.to(device), value.to(device), slots.to(torch.int32).to(device))
        written.append((key.transpose(0, 1), value.transpose(0, 1)))
    return cache, tables.to(device), written


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("plain", torch.float32, 2e-5), ("plain", torch.bfloat16, 2e-2), ("int8", torch.bfloat16, 4e-2),
     ("fp8", torch.bfloat16, 0.12), ("int4", torch.bfloat16, 0.2)],
)  # fmt: skip
def test_paged_attention(
    kind: CacheKind, dtype: torch.dtype, tolerance: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [1, 70]
    cache, tables, written = filled(kind, lengths, 2, 24, dtype, device)
    # what a split without pages leaves as it was must not be read
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, torch.nan, **how))
    query = draw(9, 2, 6, 24).to(dtype)
    count = torch.tensor(lengths, dtype=torch.int32, device=device)
    for window, softcap, splits in ((0, 0.0, None), (40, 20.0, 2), (0, 0.0, 4)) if kind == "plain" else ((40, 0.0, 2),):
        found = paged_attention(query.to(device), cache, tables, count, 24**-0.5, window, softcap, splits).cpu()
        for number, (key, value) in enumerate(written):
            wanted = plain(query[number].unsqueeze(1), key, value, 24**-0.5, window, softcap)[0]
            error = float((found[number].double() - wanted).abs().max() / wanted.abs().max())
            assert error < tolerance, (number, window, error)


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance", "window", "softcap"),
    [("plain", torch.float32, 2e-5, 0, 20.0), ("plain", torch.bfloat16, 2e-2, 33, 0.0),
     ("int8", torch.float32, 4e-2, 0, 0.0), ("fp8", torch.float32, 0.12, 40, 0.0),
     ("int4", torch.float32, 0.2, 0, 0.0)],
)  # fmt: skip
def test_attention_of_chunks(
    kind: CacheKind, dtype: torch.dtype, tolerance: float, window: int, softcap: float, device: str
) -> None:
    lengths, new = [101, 40], [70, 3]  # one sequence in two blocks, and the end of another
    cache, tables, written = filled(kind, lengths, 1, 24, dtype, device)
    query = draw(9, sum(new), 2, 24).to(dtype)
    beside = torch.cat([query, torch.zeros_like(query)], 1).to(device)[:, :2]  # as a joined product leaves them
    first = lengths[0] - new[0]
    blocks = [(0, 0, BLOCK_QUERIES, first), (0, BLOCK_QUERIES, new[0] - BLOCK_QUERIES, first + BLOCK_QUERIES),
              (1, new[0], new[1], lengths[1] - new[1])]  # fmt: skip
    there = torch.tensor(blocks, dtype=torch.int32, device=device)
    found = chunk_attention(beside, cache, tables, there, 3 * 24**-0.5, window, softcap).cpu()
    for own, part, (key, value) in zip(query.split(new), found.split(new), written, strict=True):
        wanted = plain(own.transpose(0, 1), key, value, 3 * 24**-0.5, window, softcap)
        error = float((part.double() - wanted).abs().max() / wanted.abs().max())
        assert error < tolerance, error


def test_pages_are_shared_out_while_there_are_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "units", lambda _: 132)
    place = torch.device("cpu")
    assert [paged.splits_of(pages, 8, place) for pages in (8, 64, 128, 4096)] == [1, 8, 16, 66]
    assert paged.splits_of(4096, 64 * 8, place) == 1


def test_rounded_caches_hold_what_their_format_says(device: str) -> None:
    cache, tables, written = filled("int8", [33], 2, 16, torch.float32, device)
    assert cache.key_scale is not None
    for page, start in zip(tables[0].tolist(), (0, 32), strict=True):
        count = min(33 - start, PAGE)
        kept = (cache.keys[page].float() * cache.key_scale[page].unsqueeze(-1))[:, :count].cpu()
        wanted = written[0][0][:, start : start + count]
        assert ((kept - wanted).abs() <= cache.key_scale[page][:, :count, None].cpu() * 0.501).all()
    cache, tables, written = filled("int4", [5], 2, 24, torch.float32, device)
    page = int(tables[0, 0])
    assert cache.key_scale is not None
    step, least = cache.key_scale[page, :, :5].float().cpu().unbind(-1)
    codes = cache.keys[page, :, :5].cpu()
    codes = torch.cat([codes & 15, codes >> 4], -1)
    wanted = written[0][0]
    assert (codes.amin(-1) == 0).all()
    assert (codes.amax(-1) >= 14).all()  # steps and smallest values are rounded to bfloat16
    error = (codes * step.unsqueeze(-1) + least.unsqueeze(-1) - wanted).abs()
    assert (error <= step.unsqueeze(-1) * 0.501 + wanted.abs().amax(-1, keepdim=True) * 2**-7).all()
    cache, tables, written = filled("fp8", [5], 1, 16, torch.float32, device)
    kept = cache.keys[int(tables[0, 0]), 0, :5].cpu()
    assert torch.equal(kept, (written[0][0][0] / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    with pytest.raises(ValueError, match="calibrated"):
        Cache.empty(1, 1, 16, torch.float32, device, "fp8")


def test_a_negative_slot_writes_nothing(device: str) -> None:
    cache = Cache.empty(2, 1, 16, torch.float32, device)
    write(cache, inputs(1, 16, torch.float32).reshape(1, 1, 16).to(device), torch.ones(1, 1, 16, device=device),
          torch.tensor([-1], dtype=torch.int32, device=device))  # fmt: skip
    assert float(cache.keys.abs().max()) == 0
