"""Second moments against float64, and the same bits for any number of workers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.calibration.statistics import GroupStats, LinearStats, centred, collect, collect_groups


def chunks_of(counts: list[int], width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inputs (tokens, in) of so many tokens each, their channels of different size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(width, generator=generator))
    return [(torch.randn(count, width, generator=generator) * sizes).to(dtype) for count in counts]


def full(chunks: list[Tensor], originals: list[Tensor] | None, workers: int = 1) -> LinearStats:
    with ThreadPoolExecutor(workers) as pool:
        return collect(chunks, dict(enumerate(originals or [])), pool)


def grouped(chunks: list[Tensor], groups: int, workers: int = 1) -> GroupStats:
    with ThreadPoolExecutor(workers) as pool:
        return collect_groups(chunks, groups, pool)


COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, width=st.sampled_from([1, 7, 64, 100, 300]), seed=st.integers(0, 1000))
def test_full_statistics_equal_float64(counts: list[int], width: int, seed: int) -> None:
    chunks, originals = chunks_of(counts, width, seed), chunks_of(counts, width, seed + 1)
    found = full(chunks, originals)
    x, other = torch.cat(chunks).double(), torch.cat(originals).double()
    tokens = max(len(x), 1)
    assert found.tokens == len(x)
    assert found.hessian.dtype == torch.float32
    size = float((x.square().sum(0) / tokens).max()) + 1e-12 if len(x) else 1.0
    torch.testing.assert_close(found.hessian.double(), x.T @ x / tokens, rtol=1e-4, atol=1e-5 * size)
    assert torch.equal(found.hessian, found.hessian.T)
    assert found.drift is not None
    torch.testing.assert_close(found.drift.difference.double(), (other - x).T @ x / tokens, rtol=1e-4, atol=1e-5 * size)
    assert full(chunks, None).drift is None
    assert torch.equal(full(chunks, None).hessian, found.hessian)


@settings(max_examples=60, deadline=None)
@given(
    counts=COUNTS,
    groups=st.sampled_from([1, 2, 5]),
    size=st.sampled_from([1, 16, 33, 128]),
    seed=st.integers(0, 1000),
)
def test_group_statistics_equal_float64(counts: list[int], groups: int, size: int, seed: int) -> None:
    chunks = chunks_of(counts, groups * size, seed)
    found = grouped(chunks, groups)
    x = torch.cat(chunks).double()
    tokens = max(len(x), 1)
    assert found.tokens == len(x)
    assert found.blocks.shape == (groups, size, size)
    scale = float((x.square().sum(0) / tokens).max()) + 1e-12 if len(x) else 1.0
    for group in range(groups):
        part = x[:, group * size : (group + 1) * size]
        torch.testing.assert_close(found.blocks[group].double(), part.T @ part / tokens, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(found.absmean.double(), x.abs().sum(0) / tokens, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.square_mean.double(), x.square().sum(0) / tokens, rtol=1e-4, atol=1e-6)


def test_the_drift_may_be_taken_from_a_part_of_the_chunks() -> None:
    """D and H are over the same tokens there, while the Hessian of the linear is over all."""
    chunks, originals = chunks_of([30, 20, 40], 70), chunks_of([30, 20, 40], 70, seed=5)
    with ThreadPoolExecutor(2) as pool:
        found = collect(chunks, {2: originals[2], 0: originals[0]}, pool)
    x, other = torch.cat([chunks[0], chunks[2]]), torch.cat([originals[0], originals[2]])
    part, whole = full([x], [other]), full(chunks, None)
    assert found.drift is not None
    assert part.drift is not None
    assert found.drift.tokens == 70
    assert found.tokens == 90
    torch.testing.assert_close(found.drift.difference, part.drift.difference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.drift.hessian, part.hessian, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.hessian, whole.hessian, rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    chunks = chunks_of([500] * 8, 96, dtype=torch.bfloat16)
    x = torch.cat(chunks).double()
    exact = x.T @ x / len(x)
    found = full(chunks, None)
    assert found.hessian.dtype == torch.float32
    assert float((found.hessian.double() - exact).norm() / exact.norm()) < 2e-3
    blocks = grouped(chunks, 3).blocks
    expected = torch.stack([exact[i : i + 32, i : i + 32] for i in (0, 32, 64)])
    assert float((blocks.double() - expected).norm() / expected.norm()) < 2e-3


def test_a_small_drift_keeps_its_precision() -> None:
    """The inputs of the two models differ by a part in a thousand; their difference must not drown in the sums."""
    chunks = chunks_of([400, 400], 64)
    originals = [chunk * (1 + 1e-3 * torch.sin(torch.arange(64.0))) for chunk in chunks]
    found = full(chunks, originals).drift
    x, other = torch.cat(chunks).double(), torch.cat(originals).double()
    exact = (other - x).T @ x / len(x)
    assert found is not None
    assert float((found.difference.double() - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("width", [48, 300, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workers_change_no_bit(width: int, dtype: torch.dtype) -> None:
    chunks, originals = chunks_of([90, 1, 0, 70], width, 0, dtype), chunks_of([90, 1, 0, 70], width, 1, dtype)
    one = full(chunks, originals)
    groups = grouped(chunks, 4 if width % 4 == 0 else 1)
    for workers in (1, 2, 3):
        for _ in range(3):
            again = full(chunks, originals, workers)
            assert torch.equal(again.hessian, one.hessian)
            assert again.drift is not None
            assert one.drift is not None
            assert torch.equal(again.drift.difference, one.drift.difference)
            others = grouped(chunks, len(groups.blocks), workers)
            assert torch.equal(others.blocks, groups.blocks)
            assert torch.equal(others.absmean, groups.absmean)


def test_centred_statistics_are_those_of_centred_inputs() -> None:
    chunks = [torch.randn(50, 7, generator=torch.Generator().manual_seed(place)) + 0.5 for place in range(3)]
    originals = {place: chunks[place] * 1.1 + 0.3 for place in (0, 2)}
    with ThreadPoolExecutor(1) as pool:
        found, means = centred(collect(chunks, originals, pool), chunks, originals)
    seen, wanted = torch.cat([chunks[0], chunks[2]]), torch.cat([originals[0], originals[2]])
    mean = torch.cat(chunks).mean(0)
    torch.testing.assert_close(means.now, mean)
    torch.testing.assert_close(means.wanted, mean + (wanted - seen).mean(0))
    about = torch.cat(chunks) - mean
    torch.testing.assert_close(found.hessian, about.T @ about / 150, rtol=1e-4, atol=1e-5)
    assert found.drift is not None
    moved, near = wanted - seen, seen - seen.mean(0)
    torch.testing.assert_close(found.drift.difference, (moved - moved.mean(0)).T @ near / 100, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.drift.hessian, near.T @ near / 100, rtol=1e-4, atol=1e-5)


def test_no_tokens_at_all() -> None:
    found = full(chunks_of([0], 24), chunks_of([0], 24))
    assert found.tokens == 0
    assert not found.hessian.any()
    assert found.drift is not None
    assert not found.drift.difference.any()
    groups = grouped(chunks_of([0, 0], 24), 3)
    assert groups.tokens == 0
    assert not groups.blocks.any()
    assert not groups.absmean.any()
