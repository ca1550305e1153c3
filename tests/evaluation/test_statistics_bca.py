"""The bootstrap interval against scipy's, and what it does where resampling tells nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from compress.errors import UserError, WorkError
from compress.evaluation.statistics import Interval, bca, bca_at, bca_ratio, ratio

RANDOM = np.random.default_rng(3)
SIZES = RANDOM.lognormal(0.0, 0.5, 40)
SUMS = SIZES * 0.05 * RANDOM.lognormal(0.0, 0.3, 40)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_without_widening_it_is_scipys_bca(level: float) -> None:
    theirs = stats.bootstrap(
        (SUMS, SIZES),
        lambda y, x, axis: y.sum(axis) / x.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=60_000,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    ours = bca_ratio(SUMS, SIZES, level, seed=0, draws=60_000, widen=False)
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.015 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.015 * width)
    assert ours.estimate == ratio(SUMS, SIZES).estimate
    percentile = np.quantile(bca._resampled(SUMS, SIZES, 0, 60_000), [(1 - level) / 2, (1 + level) / 2])
    assert abs(ours.high - percentile[1]) > 0.03 * width  # the correction is not lost in the tolerance


def test_widening_uses_the_variance_and_degrees_of_freedom_of_the_ratio() -> None:
    wide, efron, t = bca_ratio(SUMS, SIZES), bca_ratio(SUMS, SIZES, widen=False), ratio(SUMS, SIZES)
    assert wide.low < efron.low
    assert efron.high < wide.high
    assert (wide.high - wide.low) == pytest.approx(t.high - t.low, rel=0.15)


def test_the_same_seed_gives_the_same_interval_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bca_ratio(SUMS, SIZES, seed=5)
    assert whole != bca_ratio(SUMS, SIZES, seed=6)
    monkeypatch.setattr(bca, "CHUNK", 40 * 999)
    assert bca_ratio(SUMS, SIZES, seed=5) == whole


def test_all_levels_come_of_the_same_resamples() -> None:
    at = bca_at(SUMS, SIZES, seed=5)
    assert at(0.9) == bca_ratio(SUMS, SIZES, 0.9, seed=5)
    found = [at(level) for level in (0.0, 0.5, 0.9, 0.95)]
    for inner, outer in itertools.pairwise(found):
        assert outer.low < inner.low <= inner.high < outer.high


def test_ends_that_the_draws_cannot_tell_are_infinite() -> None:
    found = bca_ratio(SUMS, SIZES, 1 - 2e-6)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.estimate == ratio(SUMS, SIZES).estimate


def test_clusters_that_agree_have_no_spread() -> None:
    assert bca_ratio([0.0] * 9, [10.0] * 9) == Interval(0.0, 0.0, 0.0, 0.95)
    assert bca_ratio([2.0] * 9, [10.0] * 9) == Interval(0.2, 0.2, 0.2, 0.95)


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(WorkError, match="no interval"):
        bca_ratio([1.0], [1.0])
    with pytest.raises(WorkError, match="nothing to divide by"):
        bca_ratio([1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0])
    with pytest.raises(UserError, match="too few"):
        bca_ratio(SUMS, SIZES, draws=100)
    with pytest.raises(UserError, match="level"):
        bca_ratio(SUMS, SIZES, 1.0)
