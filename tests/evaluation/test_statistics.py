"""Intervals against scipy, against hand calculations, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from compress.errors import WorkError
from compress.evaluation.statistics import (
    Interval,
    mean_difference,
    perplexity,
    perplexity_ratio,
    ratio,
    share_bounds,
    t_quantile,
)


def test_quantiles_are_scipys() -> None:
    for degrees in (1, 2, 7, 31, 200):
        for probability in (0.05, 0.9, 0.975, 0.995):
            assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_with_equal_blocks_it_is_the_t_interval_of_the_mean(level: float) -> None:
    sums = np.random.default_rng(0).normal(20, 4, 17)
    found = ratio(sums, [10] * 17, level)
    low, high = stats.t.interval(level, 16, loc=sums.mean() / 10, scale=stats.sem(sums / 10))
    assert (found.estimate, found.low, found.high) == pytest.approx((sums.mean() / 10, low, high))


def test_with_unequal_blocks_it_is_the_textbook_linearisation() -> None:
    y, x = np.array([3.0, 5.0, 1.0, 8.0]), np.array([10.0, 20.0, 10.0, 25.0])
    r = y.sum() / x.sum()
    variance = 4 / 3 * ((y - r * x) ** 2).sum() / x.sum() ** 2
    half = stats.t.ppf(0.975, 3) * math.sqrt(variance)
    found = ratio(y, x)
    assert (found.estimate, found.low, found.high) == pytest.approx((r, r - half, r + half))


def test_perplexity_is_exp_of_the_interval_of_the_mean() -> None:
    nll, tokens = [300.0, 320.0, 290.0], [100, 100, 100]
    found, log = perplexity(nll, tokens), ratio(nll, tokens)
    assert (found.estimate, found.low, found.high) == tuple(map(math.exp, (log.estimate, log.low, log.high)))


def test_pairing_removes_what_blocks_have_in_common() -> None:
    random = np.random.default_rng(1)
    tokens = [2044] * 32
    hard = random.normal(3.6, 0.3, 32) * 2044  # blocks differ much in how hard they are
    candidate = hard + random.normal(0.02, 0.002, 32) * 2044
    paired = perplexity_ratio(candidate, hard, tokens)
    unpaired = perplexity(candidate, tokens)
    assert paired.low < math.exp(0.02) < paired.high
    assert (paired.high - paired.low) * 20 < (unpaired.high - unpaired.low) / unpaired.estimate


def test_difference_of_two_models_on_the_same_blocks() -> None:
    first, second, tokens = [4.0, 6.0, 5.0], [3.0, 4.5, 4.5], [10, 10, 10]
    found = mean_difference(first, second, tokens)
    low, high = stats.t.interval(0.95, 2, loc=0.1, scale=stats.sem([0.1, 0.15, 0.05]))
    assert (found.estimate, found.low, found.high) == pytest.approx((0.1, low, high))


SPREAD = 0.15  # of block means, in logarithms; in the packaged text it is 0.08


def clustered(random: np.random.Generator, blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL sums of two models per block: blocks differ by twice what they do in the packaged text, and are skewed."""
    tokens = np.full(blocks, 2044.0)
    tokens[-1] = 1022.0
    level = random.lognormal(0.0, SPREAD, blocks)
    first = tokens * 0.012 * level * random.lognormal(0.0, 0.1, blocks)
    second = tokens * 0.015 * level * random.lognormal(0.0, 0.1, blocks)
    return first, second, tokens


@pytest.mark.parametrize("blocks", [8, 32])
def test_coverage_of_mean_kl_and_of_the_ratio_of_two(blocks: int) -> None:
    """3,000 draws: a nominal 95% interval covers no less than 93.5%."""
    random = np.random.default_rng(blocks)
    truth = 0.012 * math.exp(SPREAD**2 / 2 + 0.1**2 / 2)
    mean_hits = ratio_hits = 0
    for _ in range(3000):
        first, second, tokens = clustered(random, blocks)
        mean, quotient = ratio(first, tokens), ratio(first, second)
        mean_hits += mean.low <= truth <= mean.high
        ratio_hits += quotient.low <= 0.8 <= quotient.high
    assert 0.935 <= mean_hits / 3000 <= 0.97
    assert 0.935 <= ratio_hits / 3000 <= 0.97


def test_false_passes_at_the_margin_stay_near_alpha() -> None:
    """A model exactly on the limit: its upper 95% bound is below it in at most 5% + 1.5 points of 4,000 draws."""
    random = np.random.default_rng(3)
    tokens = np.full(32, 2044.0)
    passes = 0
    for _ in range(4000):
        nll = tokens * (math.log(1.04) + random.normal(0, 0.01, 32))
        passes += perplexity_ratio(nll, np.zeros(32), tokens, 0.9).high <= 1.04
    assert 0.03 <= passes / 4000 <= 0.065


def test_rare_shares_have_bounds_even_without_a_hit() -> None:
    low, high = share_bounds([0] * 8, [2044] * 8, 0.05)
    assert (low, high) == (0.0, pytest.approx(1 - 0.05 ** (1 / (8 * 2044))))
    assert share_bounds([2044] * 8, [2044] * 8, 0.05)[1] == 1.0


def test_bounds_of_rare_shares_are_never_narrower_than_the_exact_binomial_ones() -> None:
    counts, tokens = [2, 2, 2, 2, 2, 2, 2, 2], [2000] * 8
    exact = stats.binomtest(16, 16000).proportion_ci(0.9, "exact")
    assert share_bounds(counts, tokens, 0.05) == pytest.approx((exact.low, exact.high))
    low, high = share_bounds([16, 0, 0, 0, 0, 0, 0, 0], tokens, 0.05)
    assert low == 0.0
    assert high > exact.high


def test_exp_saturates() -> None:
    assert Interval(1.0, -1e6, 1e6, 0.95).exp() == Interval(math.e, 0.0, math.exp(709), 0.95)


@pytest.mark.parametrize(
    ("numerators", "denominators"),
    [
        ([1.0], [2.0]),
        ([], []),
        ([1.0, 2.0], [1.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([1.0, math.nan], [1.0, 1.0]),
        ([1.0, math.inf], [1.0, 1.0]),
        ([1.0, 1.0], [1.0, math.nan]),
    ],
)
def test_what_has_no_interval_is_refused(numerators: list[float], denominators: list[float]) -> None:
    with pytest.raises(WorkError, match="no interval"):
        ratio(numerators, denominators)
