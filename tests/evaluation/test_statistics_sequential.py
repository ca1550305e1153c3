"""Several tests and several looks: Holm against statsmodels, Pocock against his table and scipy's normal integral."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from compress.errors import UserError, WorkError
from compress.evaluation.statistics import Pairs, holm, paired_difference, ratio, spent_alpha
from compress.evaluation.statistics.sequential import crossing
from tests.evaluation.clusters import BLOCKS, POPULATIONS, samples


def test_holm_is_statsmodels() -> None:
    random = np.random.default_rng(0)
    rejected = []
    for size in (1, 2, 5, 5, 5, 12, 12, 12):  # few: statsmodels collects garbage each time
        values = random.beta(0.3, 5, size)
        theirs = multipletests(values, alpha=0.05, method="holm")[0].tolist()
        assert list(holm({str(i): float(p) for i, p in enumerate(values)}, 0.05).values()) == theirs
        rejected += theirs
    assert 0 < sum(rejected) < len(rejected)


def test_holm_is_between_bonferroni_and_no_correction() -> None:
    p_values = {"a": 0.04, "b": 0.01, "c": 0.02}
    assert holm(p_values, 0.05) == {"a": True, "b": True, "c": True}
    assert holm({**p_values, "d": 0.9}, 0.05) == {"a": False, "b": True, "c": False, "d": False}
    assert holm({}, 0.05) == {}


def test_holm_refuses_what_is_no_p_value() -> None:
    for bad in (math.nan, -0.1, 1.1):
        with pytest.raises(WorkError, match="p-value of b"):
            holm({"a": 0.01, "b": bad}, 0.05)
    with pytest.raises(UserError, match="alpha"):
        holm({"a": 0.01}, 1.0)


# Pocock 1977, table 1, as critical values for an overall two-sided 0.05 and 0.01.
POCOCK = {
    (0.05, 2): 2.178,
    (0.05, 3): 2.289,
    (0.05, 4): 2.361,
    (0.05, 5): 2.413,
    (0.05, 10): 2.555,
    (0.01, 2): 2.772,
    (0.01, 5): 2.986,
}


@pytest.mark.parametrize(("alpha", "looks"), POCOCK)
def test_two_sided_it_is_pococks_table(alpha: float, looks: int) -> None:
    critical = stats.norm.ppf(1 - spent_alpha(alpha, looks, sides=2) / 2)
    assert critical == pytest.approx(POCOCK[alpha, looks], abs=1e-3)


@pytest.mark.parametrize("looks", [2, 3])
def test_one_sided_it_is_a_multivariate_normal_integral(looks: int) -> None:
    share = spent_alpha(0.05, looks)
    times = np.arange(1, looks + 1)
    correlation = np.sqrt(np.minimum.outer(times, times) / np.maximum.outer(times, times))
    bound = np.full(looks, stats.norm.ppf(1 - share))
    never = stats.multivariate_normal.cdf(bound, cov=correlation, maxpts=2_000_000, abseps=1e-9, releps=1e-9)
    assert 1 - never == pytest.approx(0.05, abs=1e-5)
    assert crossing(float(bound[0]), looks) == pytest.approx(1 - never, abs=1e-5)


def test_each_look_gets_less_the_more_there_are() -> None:
    assert spent_alpha(0.05, 1) == 0.05
    shares = [spent_alpha(0.05, looks) for looks in (1, 2, 3, 5, 10, 20)]
    assert shares == sorted(shares, reverse=True)
    assert all(share > 0.05 / looks for share, looks in zip(shares[1:], (2, 3, 5, 10, 20), strict=True))


@pytest.mark.parametrize(("alpha", "looks"), [(0.05, 0), (0.05, 21), (0.0, 2), (0.5, 2), (math.nan, 2)])
def test_impossible_plans_are_refused(alpha: float, looks: int) -> None:
    with pytest.raises(UserError):
        spent_alpha(alpha, looks)


# --- whole runs that extend ------------------------------------------------------------------------------------------

RUNS = [1500, pytest.param(10_000, marks=pytest.mark.slow)]


def most(runs: int) -> float:
    """alpha + 1.5 points, and for small simulations two of their standard errors."""
    return 0.065 + (2 * math.sqrt(0.05 * 0.95 / runs) if runs < 10_000 else 0)


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("population", ["perplexity", "KL"])
def test_three_looks_at_blocks_keep_the_overall_alpha(population: str, runs: int) -> None:
    """A model exactly on the limit, looked at after 14, 28 and 42 blocks until it passes."""
    one = POPULATIONS[population]
    careful, careless = 1 - 2 * spent_alpha(0.05, 3), 1 - 2 * 0.05
    kept = lost = 0
    for sums in samples(one, BLOCKS, runs, 11):
        kept += any(ratio(sums[:n], BLOCKS[:n], careful).high <= one.truth for n in (14, 28, 42))
        lost += any(ratio(sums[:n], BLOCKS[:n], careless).high <= one.truth for n in (14, 28, 42))
    assert kept / runs <= most(runs)
    assert lost / runs > 0.08  # what spending the whole alpha at each look does


@pytest.mark.parametrize("runs", RUNS)
def test_three_looks_at_items_keep_the_overall_alpha(runs: int) -> None:
    """A loss of exactly the margin, 2 points at 6% flips, looked at after 400, 800 and 1,200 items."""
    random = np.random.default_rng(12)
    careful, careless = 1 - 2 * spent_alpha(0.05, 3), 1 - 2 * 0.05
    kept = lost = 0
    for _ in range(runs):
        counts = np.cumsum(random.multinomial(400, [0.04, 0.02, 0.94], size=3), axis=0)
        looks = [Pairs(400 * (i + 1), 0, int(b), int(c)) for i, (b, c, _) in enumerate(counts)]
        kept += any(paired_difference(pairs, careful).low > -0.02 for pairs in looks)
        lost += any(paired_difference(pairs, careless).low > -0.02 for pairs in looks)
    assert kept / runs <= most(runs)
    assert lost / runs > 0.08
