"""Sharing a sparsity out among blocks: exact in sum, in the right order, within bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.pruning import allocation


@settings(max_examples=50, deadline=None)
@given(
    measured=st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10**6)), min_size=1, max_size=12),
    share=st.floats(0.02, 0.98),
)
def test_all_together_are_as_sparse_as_asked(measured: list[tuple[float, int]], share: float) -> None:
    values, sizes = [value for value, _ in measured], [size for _, size in measured]
    for shared in (allocation.by_outliers, allocation.by_spectra):
        found = shared(values, sizes, share)
        mean = sum(each * size for each, size in zip(found, sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(share, abs=1e-9)
        assert all(allocation.LEAST <= each <= allocation.MOST for each in found)


def test_outliers_keep_more_and_flat_spectra_less() -> None:
    by_outliers = allocation.by_outliers([0.0, 1.0, 4.0], [100, 100, 100], 0.5)
    assert by_outliers[0] > by_outliers[1] > by_outliers[2]
    assert by_outliers[0] - by_outliers[2] == pytest.approx(2 * allocation.OWL_SPREAD)
    by_spectra = allocation.by_spectra([2.0, 3.0, 6.0], [100, 100, 100], 0.5)
    assert by_spectra[0] < by_spectra[1] < by_spectra[2]
    assert by_spectra[2] - by_spectra[0] == pytest.approx(0.5 * 2 * allocation.ALPHA_SPREAD)
    assert allocation.by_outliers([1.0, 1.0], [1, 5], 0.3) == pytest.approx([0.3, 0.3])


def test_outliers_are_counted_against_the_mean() -> None:
    weight = torch.ones(4, 8)
    weight[0, 0], weight[1, 3] = 100.0, -100.0
    square_mean = torch.full((8,), 4.0)
    square_mean[5] = 40_000.0  # inputs a hundred times as large
    scores = allocation.importance(weight, square_mean)
    assert float(scores[2, 5]) == pytest.approx(200.0)
    assert allocation.outliers(weight, square_mean, float(scores.mean())) == 6


def test_heavy_tails_have_small_exponents() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(96, 64, generator=generator)).Q
    ranks = torch.arange(1, 65, dtype=torch.float32)
    heavy, light = ((left * ranks.pow(-power / 2)) @ right.T for power in (1.0, 0.25))
    found = [allocation.tail_exponent(weight) for weight in (heavy, light)]
    assert found[0] == pytest.approx(2.0, rel=0.1)  # eigenvalue ~ rank^-1: density ~ eigenvalue^-2
    assert found[1] == pytest.approx(5.0, rel=0.1)
    assert allocation.tail_exponent(heavy.T) == pytest.approx(found[0], rel=1e-6)
    assert allocation.tail_exponent(torch.zeros(4, 4)) == 1.0
