"""What the intervals over clusters cover, by simulation, at the sizes used: 42 blocks and 62 documents of one text.

The bar: no interval covers its truth more than 1.5 points below its nominal level, and a model exactly on a limit
passes in at most alpha + 1.5 points of all cases. The slow tests hold the bar with 10,000 runs; the ordinary ones are
smaller and allow two standard errors of the simulation more, which a wrong formula still fails: the last tests show
that plain formulas do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from compress.evaluation.statistics import Interval, bca_at, perplexity_ratio, ratio
from compress.evaluation.summary import KL_THRESHOLDS, ClusterSums, Summary, summarise
from tests.evaluation.clusters import ARTICLES, BLOCKS, POPULATIONS, SIZES, Column, Coverage, coverage, kl_sums, samples

RUNS = [1500, pytest.param(10_000, marks=pytest.mark.slow)]


def least(runs: int, level: float = 0.95) -> float:
    """The bar, and for small simulations two of their standard errors below it."""
    return level - 0.015 - (2 * math.sqrt(level * (1 - level) / runs) if runs < 10_000 else 0)


def worst(found: Coverage) -> float:
    return min(found.inside, found.low, found.high)


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("population", POPULATIONS)
def test_ratio_covers(population: str, sizes: str, runs: int) -> None:
    found = coverage(POPULATIONS[population], SIZES[sizes], ratio, runs)
    assert worst(found) >= least(runs), found
    assert found.inside <= 0.98, found  # not by being as wide as can be


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("blocks", [8, 14])
def test_ratio_covers_with_few_blocks(blocks: int, runs: int) -> None:
    found = coverage(POPULATIONS["KL"], BLOCKS[-blocks:], ratio, runs)
    assert worst(found) >= least(runs), found


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_ratio_of_two_models_kl_is_covered(sizes: str, runs: int) -> None:
    """Whose KL is smaller: both vary with the documents, so the quotient is much better known than either."""
    random = np.random.default_rng(5)
    hits, widths = 0, []
    for theirs in samples(POPULATIONS["KL"], SIZES[sizes], runs, 6):
        ours = 0.8 * theirs * random.lognormal(-(0.1**2) / 2, 0.1, len(theirs))
        found = ratio(ours, theirs)
        hits += found.low <= 0.8 <= found.high
        widths.append(found.high - found.low)
    assert hits / runs >= least(runs)
    assert np.median(widths) < 0.1


def small_bca(sums: Column, sizes: Column, level: float) -> Interval:
    return bca_at(sums, sizes, seed=1, draws=1000)(level)


@pytest.mark.parametrize("runs", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("population", ["perplexity", "KL"])
def test_bca_covers(population: str, sizes: str, runs: int) -> None:
    found = coverage(POPULATIONS[population], SIZES[sizes], small_bca, runs)
    assert worst(found) >= least(runs), found


# --- shares of tokens ------------------------------------------------------------------------------------------------


def shares_of(missed: list[int], tokens: int) -> Summary:
    """The summary of clusters of so many tokens each, all of them confident, of which so many do not agree."""
    clusters = len(missed)
    agree = [tokens - count for count in missed]
    return summarise(
        ClusterSums(
            tokens=[tokens] * clusters,
            text_bytes=[tokens] * clusters,
            nll=[1.0] * clusters,
            nll_baseline=[1.0] * clusters,
            kl=[0.0] * clusters,
            dp=[0.0] * clusters,
            dp2=[0.0] * clusters,
            top1_agree=agree,
            confident=[tokens] * clusters,
            confident_agree=agree,
            kl_above=[[0] * len(KL_THRESHOLDS)] * clusters,
        )
    )


def test_a_share_without_a_single_miss_is_not_certain() -> None:
    """3,024 tokens that all agree: the truth may be as low as 99.88%, 0.025 ** (1 / 3024)."""
    found = shares_of([0] * 8, 378)
    for interval in (found.top1_agreement, found.top1_agreement_confident):
        assert interval is not None
        assert (interval.estimate, interval.high, interval.level) == (1.0, 1.0, 0.95)
        assert interval.low == pytest.approx(0.025 ** (1 / 3024), rel=1e-9)


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("missed", [0.0005, 0.002, 0.02, 0.1])
def test_shares_of_tokens_cover(missed: float, runs: int) -> None:
    random = np.random.default_rng(3)
    inside = low = 0
    for _ in range(runs):
        counts = random.binomial(378, missed, 8).tolist()
        found = shares_of(counts, 378).top1_agreement
        assert found is not None
        inside += found.low <= 1 - missed <= found.high
        low += found.low <= 1 - missed
    assert inside / runs >= least(runs)
    assert low / runs >= least(runs, 0.975)


@pytest.mark.parametrize("runs", RUNS)
def test_shares_of_tokens_cover_where_neighbours_are_alike(runs: int) -> None:
    """Blocks whose own share of misses varies by half of the mean, as that of documents does."""
    random = np.random.default_rng(4)
    missed, tokens = 0.01, 2044
    hits = 0
    for _ in range(runs):
        rates = missed * random.gamma(4.0, 1 / 4.0, 8)
        found = shares_of(random.binomial(tokens, np.minimum(rates, 1.0)).tolist(), tokens).top1_agreement
        assert found is not None
        hits += found.low <= 1 - missed <= found.high
    assert hits / runs >= least(runs)


# --- false passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("population", ["perplexity", "KL"])
def test_a_model_exactly_on_the_limit_passes_as_often_as_alpha_says(population: str, sizes: str, runs: int) -> None:
    one, x = POPULATIONS[population], SIZES[sizes]
    passes = 0
    for sums in samples(one, x, runs, 7):
        if population == "perplexity":
            passes += perplexity_ratio(sums, np.zeros(len(x)), x, 0.9).high <= math.exp(one.truth)
        else:
            passes += ratio(sums, x, 0.9).high <= one.truth
    assert passes / runs <= 1 - least(runs)
    assert passes / runs >= 0.02


# --- formulas that do not do -----------------------------------------------------------------------------------------


def plain_t(sums: Column, sizes: Column, level: float) -> Interval:
    """The textbook's: linearised variance, clusters - 1 degrees of freedom."""
    clusters, estimate = len(sums), float(sums.sum() / sizes.sum())
    residuals = (sums - estimate * sizes) / sizes.sum()
    error = math.sqrt(clusters / (clusters - 1) * float(residuals @ residuals))
    half = float(stats.t.ppf((1 + level) / 2, clusters - 1)) * error
    return Interval(estimate, estimate - half, estimate + half, level)


def efron(sums: Column, sizes: Column, level: float) -> Interval:
    return bca_at(sums, sizes, seed=1, draws=1000, widen=False)(level)


@pytest.mark.parametrize(
    ("interval", "sizes", "runs"),
    [
        (plain_t, ARTICLES, 3000),
        (plain_t, ARTICLES[:30], 3000),
        pytest.param(efron, ARTICLES, 3000, marks=pytest.mark.slow),
    ],
)
def test_plain_formulas_miss_the_bar(interval: Callable[..., Interval], sizes: Column, runs: int) -> None:
    """With the KL of documents of unequal length; `ratio` holds it on the same samples."""
    population = kl_sums(0.05, 0.2)
    assert worst(coverage(population, sizes, interval, runs, seed=8)) < 0.935
    assert worst(coverage(population, sizes, ratio, runs, seed=8)) >= least(runs)


def test_the_interval_over_clusters_alone_misses_the_bar_for_rare_misses() -> None:
    """In every fifth sample no token misses, and then it has no width."""
    random = np.random.default_rng(3)
    counts = random.binomial(378, 0.0005, (2000, 8))
    hits = [found.low <= 0.0005 <= found.high for found in (ratio(row, [378.0] * 8) for row in counts)]
    assert np.mean(hits) < 0.9
