"""Paired accuracy: against statsmodels, against a likelihood maximised by hand, and with its exact coverage.

Coverage here is not simulated but summed over all outcomes of the trinomial distribution, which leaves no noise.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar

from compress.errors import IntegrityError, WorkError
from compress.evaluation.statistics import (
    Interval,
    Pairs,
    agresti_min,
    clustered_difference,
    mcnemar,
    mcnemar_midp,
    paired_difference,
    pairs_of,
    ratio,
    tango,
)

TABLES = [(100, 3, 1), (100, 0, 0), (100, 7, 0), (300, 12, 18), (1000, 40, 60), (20, 20, 0), (20, 0, 19), (1, 0, 1)]


def test_pairs_are_counted() -> None:
    pairs = pairs_of([1, 1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 1])
    assert pairs == Pairs(6, 2, 2, 1)
    assert (pairs.difference, pairs.flips) == (-1 / 6, 0.5)


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(IntegrityError, match="2 items of the baseline cannot be paired with 1"):
        pairs_of([1, 0], [1])
    with pytest.raises(WorkError, match="no item"):
        pairs_of([], [])
    with pytest.raises(WorkError, match="neither right"):
        pairs_of([1, 2], [1, 0])


@pytest.mark.parametrize(("n", "lost", "won"), TABLES)
def test_mcnemar_is_statsmodels_and_scipys(n: int, lost: int, won: int) -> None:
    pairs, flips = Pairs(n, 0, lost, won), lost + won
    exact = reference_mcnemar([[n - flips, lost], [won, 0]], exact=True).pvalue if flips else 1.0
    assert mcnemar(pairs) == pytest.approx(exact)
    if flips:
        seen = stats.binom.pmf(min(lost, won), flips, 0.5)
        midp = 2 * stats.binom.cdf(min(lost, won), flips, 0.5) - seen
        assert mcnemar_midp(pairs) == pytest.approx(midp)
    else:
        assert mcnemar_midp(pairs) == 1.0


@pytest.mark.parametrize(("n", "lost", "won"), TABLES)
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_agresti_min_is_walds_interval_of_the_table_with_half_an_item_more_in_each_cell(
    n: int, lost: int, won: int, level: float
) -> None:
    shares = np.array([lost + 0.5, won + 0.5, n - lost - won + 1.0]) / (n + 2)
    contrast = np.array([-1.0, 1.0, 0.0])
    covariance = (np.diag(shares) - np.outer(shares, shares)) / (n + 2)
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(contrast @ covariance @ contrast)
    found = agresti_min(Pairs(n, 0, lost, won), level)
    middle = contrast @ shares
    assert (found.low, found.high) == pytest.approx((max(-1, middle - half), min(1, middle + half)))
    assert found.estimate == (won - lost) / n


def likeliest_variance(n: int, lost: int, won: int, change: float) -> float:
    """Variance of won - lost under the true change that makes the counts likeliest, by numerical search."""

    def unlikely(share: float) -> float:
        cells = np.array([share, share + change, 1 - 2 * share - change])
        return -float(stats.multinomial.logpmf([lost, won, n - lost - won], n, cells / cells.sum()))

    low, high = max(0.0, -change), (1 - change) / 2
    share = optimize.minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return n * (2 * share + change - change**2)


@pytest.mark.parametrize(("n", "lost", "won"), TABLES)
def test_tangos_bounds_are_where_a_score_test_by_numerical_likelihood_stops_refusing(
    n: int, lost: int, won: int
) -> None:
    found = tango(Pairs(n, 0, lost, won), 0.95)
    for bound in (found.low, found.high):
        if abs(bound) < 1:
            deviation = won - lost - n * bound
            assert deviation**2 / likeliest_variance(n, lost, won, bound) == pytest.approx(1.959964**2, rel=1e-4)
        else:
            assert bound == found.estimate
    assert found.low <= found.estimate <= found.high


def test_tangos_interval_without_flips_is_known_in_closed_form() -> None:
    z2 = stats.norm.ppf(0.95) ** 2
    found = tango(Pairs(50, 20, 0, 0), 0.9)
    assert (found.low, found.high) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)))


@pytest.mark.parametrize("interval", [agresti_min, tango, paired_difference])
def test_exchanging_the_models_turns_the_interval_round(interval: Callable[[Pairs, float], Interval]) -> None:
    for n, lost, won in TABLES:
        one, other = interval(Pairs(n, 0, lost, won), 0.9), interval(Pairs(n, 0, won, lost), 0.9)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)


@pytest.mark.parametrize("interval", [agresti_min, tango, paired_difference])
def test_every_level_has_bounds_and_they_are_nested(interval: Callable[[Pairs, float], Interval]) -> None:
    for n, lost, won in TABLES:
        found = [interval(Pairs(n, 0, lost, won), level) for level in (0.0, 1e-9, 0.5, 0.95, 1 - 1e-9)]
        for inner, outer in itertools.pairwise(found):
            assert outer.low <= inner.low
            assert inner.high <= outer.high


# --- what they cover -------------------------------------------------------------------------------------------------


def outcomes(n: int, flips: float, change: float) -> Iterator[tuple[int, int, float]]:
    """(lost, won, probability) of all outcomes that matter."""
    lost, won = (flips - change) / 2, (flips + change) / 2
    most = min(n, int(n * flips + 7 * math.sqrt(n * flips) + 8))
    b, c = (grid.ravel() for grid in np.meshgrid(np.arange(most + 1), np.arange(most + 1), indexing="ij"))
    b, c = b[b + c <= n], c[b + c <= n]
    p = stats.multinomial.pmf(np.stack([b, c, n - b - c], 1), n, [lost, won, 1 - lost - won])
    for i in np.flatnonzero(p > 1e-7):
        yield int(b[i]), int(c[i]), float(p[i])


@functools.cache
def bounds(name: str, n: int, lost: int, won: int, level: float) -> tuple[float, float]:
    interval = {"agresti_min": agresti_min, "tango": tango, "both": paired_difference}[name]
    found = interval(Pairs(n, 0, lost, won), level)
    return found.low - 1e-9, found.high + 1e-9


def covers(name: str, n: int, flips: float, change: float) -> tuple[float, float, float]:
    """Exact coverage of the two-sided 95% interval, the lower and the upper 95% bound."""
    two = low = high = 0.0
    for lost, won, p in outcomes(n, flips, change):
        below, above = bounds(name, n, lost, won, 0.95)
        two += p * (below <= change <= above)
        below, above = bounds(name, n, lost, won, 0.9)
        low += p * (below <= change)
        high += p * (change <= above)
    return two, low, high


SETTINGS = [(n, flips) for n in (100, 300, 1000) for flips in (0.02, 0.05, 0.10)]


@pytest.mark.parametrize("name", ["agresti_min", "tango", "both"])
@pytest.mark.parametrize(("n", "flips"), SETTINGS)
def test_no_interval_covers_a_true_change_of_nothing_too_rarely(name: str, n: int, flips: float) -> None:
    two, low, high = covers(name, n, flips, 0.0)
    assert min(two, low, high) >= 0.935
    assert two <= 0.998  # not by being as wide as can be


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("n", "flips"), SETTINGS)
def test_the_outer_bounds_of_both_cover_any_drop(n: int, flips: float, share: float) -> None:
    """Up to the drop where all flips are losses; nominal 95%, at most 1.5 points less."""
    assert min(covers("both", n, flips, -share * flips)) >= 0.935


def test_each_alone_covers_too_rarely_where_nearly_all_flips_go_one_way() -> None:
    """Why the gate takes the outer bounds: one fails on the side of passing, the other on the side of failing."""
    assert covers("agresti_min", 100, 0.02, -0.02)[1] == pytest.approx(0.867, abs=0.001)
    assert covers("tango", 100, 0.05, -0.03)[2] == pytest.approx(0.913, abs=0.001)


@pytest.mark.parametrize("margin", [0.01, 0.02])
@pytest.mark.parametrize(("n", "flips"), SETTINGS)
def test_a_model_exactly_at_the_margin_passes_no_more_often_than_alpha_allows(
    n: int, flips: float, margin: float
) -> None:
    passes = sum(p for b, c, p in outcomes(n, flips, -margin) if bounds("both", n, b, c, 0.9)[0] > -margin)
    assert passes <= 0.05 + 0.015


@pytest.mark.parametrize(("n", "margin", "alone"), [(100, 0.05, 0.118), (200, 0.02, 0.089)])
def test_agresti_mins_bound_alone_passes_more_at_the_margin(n: int, margin: float, alone: float) -> None:
    """Where all flips are losses: why a policy has no choice of the interval."""
    for name, least, most in (("agresti_min", alone - 0.001, alone + 0.001), ("both", 0.0, 0.05)):
        passes = sum(p for b, c, p in outcomes(n, margin, -margin) if bounds(name, n, b, c, 0.9)[0] > -margin)
        assert least <= passes <= most, name


# --- clusters --------------------------------------------------------------------------------------------------------


def test_with_clusters_it_is_the_wider_of_items_and_clusters() -> None:
    base = [1, 1, 1, 1, 0, 0, 1, 1, 1, 0]
    cand = [0, 0, 1, 1, 0, 1, 1, 1, 1, 0]
    names = ["a", "a", "b", "b", "c", "c", "d", "d", "e", "e"]
    found = clustered_difference(base, cand, names)
    items = paired_difference(pairs_of(base, cand))
    groups = ratio([-2, 0, 1, 0, 0], [2] * 5)
    assert (found.low, found.high) == (min(items.low, groups.low), max(items.high, groups.high))
    assert found.estimate == pytest.approx(-0.1)


def test_clusters_that_flip_together_widen_it_and_clusters_without_flips_leave_it_open() -> None:
    base = [1] * 400
    cand = [0] * 20 + [1] * 380
    together = clustered_difference(base, cand, [i // 20 for i in range(400)])
    apart = clustered_difference(base, cand, [i % 20 for i in range(400)])
    assert together.high - together.low > 2 * (apart.high - apart.low)
    same = clustered_difference(base, base, [i // 20 for i in range(400)])
    assert same.low < -0.005 < 0.005 < same.high


def test_clusters_have_to_fit() -> None:
    with pytest.raises(IntegrityError, match="2 items with 1 cluster"):
        clustered_difference([1, 0], [1, 1], ["a"])
    with pytest.raises(WorkError, match="no interval"):
        clustered_difference([1, 0], [1, 1], ["a", "a"])


def flips_by_paradigm(random: np.random.Generator, clusters: int, items: int) -> tuple[list[int], list[int], list[int]]:
    """67 paradigms as in BLiMP, whose rates of losses (4% on average) and gains (2%) vary as Beta variables."""
    lost, won = random.beta(1.2, 28.8, clusters), random.beta(0.6, 29.4, clusters)
    fate = random.random((clusters, items))
    base = np.where(fate < lost[:, None], 1, np.where(fate < (lost + won)[:, None], 0, 1))
    cand = np.where(fate < lost[:, None], 0, 1)
    return base.ravel().tolist(), cand.ravel().tolist(), np.repeat(np.arange(clusters), items).tolist()


@pytest.mark.parametrize("runs", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_coverage_over_paradigms_holds_where_that_over_items_breaks_down(runs: int) -> None:
    random = np.random.default_rng(4)
    by_items = by_clusters = passes = 0
    for _ in range(runs):
        base, cand, names = flips_by_paradigm(random, 67, 15)
        items = agresti_min(pairs_of(base, cand))
        groups = clustered_difference(base, cand, names)
        by_items += items.low <= -0.02 <= items.high
        by_clusters += groups.low <= -0.02 <= groups.high
        passes += clustered_difference(base, cand, names, 0.9).low > -0.02
    noise = 2 * math.sqrt(0.05 * 0.95 / runs)
    assert by_clusters / runs >= 0.935 - (noise if runs < 10_000 else 0)
    assert by_items / runs < 0.93
    assert passes / runs <= 0.065 + (noise if runs < 10_000 else 0)
