"""Intervals over clusters against scipy, against hand calculations, and against matrices."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from compress.errors import IntegrityError, UserError, WorkError
from compress.evaluation.statistics import (
    Interval,
    by_cluster,
    hull,
    mean_difference,
    perplexity,
    perplexity_ratio,
    ratio,
    ratio_error,
    share_bounds,
    t_quantile,
)
from compress.evaluation.statistics.ratios import degrees_of_freedom
from tests.evaluation.clusters import ARTICLES


def test_quantiles_are_scipys() -> None:
    for degrees in (1, 2, 7, 18.05, 31, 200):
        for probability in (0.05, 0.9, 0.975, 0.995):
            assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_with_equal_symmetric_blocks_it_is_the_t_interval_of_the_mean(level: float) -> None:
    half = np.random.default_rng(0).normal(20, 4, 9)
    sums = np.concatenate([half, 40 - half])
    found = ratio(sums, [10] * 18, level)
    low, high = stats.t.interval(level, 17, loc=sums.mean() / 10, scale=stats.sem(sums / 10))
    assert (found.estimate, found.low, found.high) == pytest.approx((sums.mean() / 10, low, high))


@pytest.mark.parametrize("sign", [1, -1])
def test_skewness_moves_one_bound_outwards_by_the_edgeworth_term(sign: int) -> None:
    sums = sign * np.random.default_rng(1).lognormal(0.0, 0.8, 25)
    found = ratio(sums, np.ones(25), 0.9)
    low, high = stats.t.interval(0.9, 24, loc=sums.mean(), scale=stats.sem(sums))
    shift = stats.skew(sums) / 5 * (1 + 2 * stats.norm.ppf(0.95) ** 2) / 6 * stats.sem(sums)
    assert sign * shift > 0.04 * (high - low)
    assert (found.low, found.high) == pytest.approx((low + min(shift, 0.0), high + max(shift, 0.0)))


def test_unequal_clusters_match_the_bias_reduced_variance_and_its_degrees_written_with_matrices() -> None:
    """Regression of y / x on a constant with weights x: sandwich CR2 with leverages, Satterthwaite by traces."""
    random = np.random.default_rng(2)
    x = random.lognormal(0.0, 1.0, 15)
    y = 0.3 * x + random.normal(0, 0.1, 15) * x
    shares = x / x.sum()
    residual = np.eye(15) - np.outer(shares, np.ones(15))  # of y, in units of y
    adjusted = np.diag(1 / np.sqrt(1 - shares)) @ residual
    meat = adjusted @ y / x.sum()
    assert ratio_error(y, x) == pytest.approx(math.sqrt(meat @ meat), rel=1e-12)
    working = adjusted @ np.diag(x**2) @ adjusted.T
    degrees = np.trace(working) ** 2 / np.trace(working @ working)
    assert degrees_of_freedom(shares) == pytest.approx(degrees, rel=1e-12)
    found = ratio(y, x)
    wide = t_quantile(0.975, degrees) * math.sqrt(meat @ meat)
    assert min(found.estimate - found.low, found.high - found.estimate) == pytest.approx(wide)


def test_degrees_of_freedom_count_clusters_only_where_they_are_equal() -> None:
    assert degrees_of_freedom(np.full(42, 1 / 42)) == pytest.approx(41)
    assert degrees_of_freedom(ARTICLES / ARTICLES.sum()) == pytest.approx(18.05, abs=0.01)
    assert 1 <= degrees_of_freedom(np.array([0.98, 0.01, 0.01])) < 1.1


def test_article_lengths_are_those_of_wikitext(shared: Path) -> None:
    text = (shared / "data/wikitext-2-raw/wiki.test.raw").read_text(encoding="utf-8")
    lengths = [0]
    for line in text.splitlines():
        parts = line.split()
        if parts[:1] == ["="] and parts[-1:] == ["="] and "=" not in parts[1:-1]:
            lengths.append(0)
        lengths[-1] += len(parts)
    assert lengths[1:] == ARTICLES.tolist()


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
    with pytest.raises(WorkError, match="no interval"):
        mean_difference(first, second[:2], tokens)


def test_a_model_against_itself_differs_by_nothing() -> None:
    sums, tokens = [3.0, 4.5, 4.5], [10, 20, 10]
    assert mean_difference(sums, sums, tokens) == Interval(0.0, 0.0, 0.0, 0.95)
    assert perplexity_ratio(sums, sums, tokens) == Interval(1.0, 1.0, 1.0, 0.95)


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


def test_the_hull_holds_both() -> None:
    assert hull(Interval(1.0, 0.0, 2.0, 0.9), Interval(1.5, -1.0, 1.8, 0.9)) == Interval(1.0, -1.0, 2.0, 0.9)


def test_sums_by_cluster_keep_the_order_of_first_appearance() -> None:
    assert by_cluster([1, 2, 3, 4], ["b", "a", "b", "c"]) == ([4, 2, 4], [2, 1, 1])
    with pytest.raises(IntegrityError, match="3 items with 2"):
        by_cluster([1, 2, 3], ["a", "b"])


@pytest.mark.parametrize(
    ("numerators", "denominators"),
    [
        ([1.0], [2.0]),
        ([], []),
        ([1.0, 2.0], [1.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([1.0, 2.0], [5.0, 0.0]),
        ([1.0, math.nan], [1.0, 1.0]),
        ([1.0, math.inf], [1.0, 1.0]),
        ([1.0, 1.0], [1.0, math.nan]),
    ],
)
def test_what_has_no_interval_is_refused(numerators: list[float], denominators: list[float]) -> None:
    with pytest.raises(WorkError, match="no interval"):
        ratio(numerators, denominators)


@pytest.mark.parametrize("level", [1.0, -0.1, math.nan])
def test_impossible_levels_are_refused(level: float) -> None:
    with pytest.raises(UserError, match="level"):
        ratio([1.0, 2.0], [1.0, 1.0], level)
