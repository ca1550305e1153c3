"""Tiled and paged attention against plain attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.weights import inputs

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels.triton.attention import causal_attention
from compress.kernels.triton.paged import PAGE, Cache, CacheKind, paged_attention, write

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


CASES = [
    ((4, 2, 70, 70, 32), 0, 0.0), ((2, 2, 5, 77, 24), 0, 0.0), ((2, 1, 70, 101, 16), 33, 0.0),
    ((3, 1, 40, 40, 64), 0, 20.0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "window", "softcap"), CASES)
def test_tiled_attention(
    sizes: tuple[int, int, int, int, int], window: int, softcap: float, dtype: torch.dtype, device: str
) -> None:
    heads, kv_heads, queries, keys, dim = sizes
    q, k = draw(1, heads, queries, dim).to(dtype), draw(2, kv_heads, keys, dim).to(dtype)
    v = draw(3, kv_heads, keys, dim).to(dtype)
    scale = 3 * dim**-0.5  # sharper than usual, so that the running maximum moves
    found = causal_attention(*(part.unsqueeze(0).to(device) for part in (q, k, v)), scale, window, softcap)
    wanted = plain(q, k, v, scale, window, softcap)
    assert float((found[0].cpu().double() - wanted).abs().max()) < TOLERANCE[dtype] * float(wanted.abs().max())


def test_attention_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        causal_attention(torch.zeros(1, 3, 2, 16), torch.zeros(1, 2, 2, 16), torch.zeros(1, 2, 2, 16), 1.0)


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
     ("fp8", torch.bfloat16, 0.12)],
)  # fmt: skip
def test_paged_attention(kind: CacheKind, dtype: torch.dtype, tolerance: float, device: str) -> None:
    lengths = [1, 70]
    cache, tables, written = filled(kind, lengths, 2, 24, dtype, device)
    query = draw(9, 2, 6, 24).to(dtype)
    count = torch.tensor(lengths, dtype=torch.int32, device=device)
    for window, softcap, splits in ((0, 0.0, None), (40, 20.0, 2)) if kind == "plain" else ((40, 0.0, 2),):
        found = paged_attention(query.to(device), cache, tables, count, 24**-0.5, window, softcap, splits).cpu()
        for number, (key, value) in enumerate(written):
            wanted = plain(query[number].unsqueeze(1), key, value, 24**-0.5, window, softcap)[0]
            error = float((found[number].double() - wanted).abs().max() / wanted.abs().max())
            assert error < tolerance, (number, window, error)


def test_rounded_caches_hold_what_their_format_says(device: str) -> None:
    cache, tables, written = filled("int8", [33], 2, 16, torch.float32, device)
    assert cache.key_scale is not None
    for page, start in zip(tables[0].tolist(), (0, 32), strict=True):
        count = min(33 - start, PAGE)
        kept = (cache.keys[page].float() * cache.key_scale[page].unsqueeze(-1))[:, :count].cpu()
        wanted = written[0][0][:, start : start + count]
        assert ((kept - wanted).abs() <= cache.key_scale[page][:, :count, None].cpu() * 0.501).all()
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
