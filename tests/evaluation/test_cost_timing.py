"""Medians, their intervals and ABBA rounds, against scipy, by hand and by simulation. No clock is read here."""

from __future__ import annotations

import math
from itertools import count

import numpy as np
import pytest
from scipy import stats

from compress.errors import WorkError
from compress.evaluation.costs.limit import Limit
from compress.evaluation.costs.timing import abba, in_turns, measured, median_interval, round_ratios


def test_the_median_of_ten_by_hand() -> None:
    found = measured([5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 10.0, 4.0, 8.0, 6.0])
    assert (found.median, found.low, found.high, found.repeats) == (5.5, 2.0, 9.0, 10)
    assert found.level == pytest.approx(1 - 2 * 11 / 1024)  # P(B(10, 1/2) <= 1) = (1 + 10) / 1024


@pytest.mark.parametrize("n", [1, 2, 5, 6, 10, 11, 20, 57])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_bounds_are_those_of_the_sign_test(n: int, level: float) -> None:
    values = list(np.random.default_rng(n).lognormal(size=n))
    found = median_interval(values, level)
    ordered = sorted(values)
    rank = ordered.index(found.low) + 1
    assert found.high == ordered[n - rank]
    assert found.level == pytest.approx(1 - 2 * stats.binom.cdf(rank - 1, n, 0.5))
    if found.level >= level:  # and the next pair inward would not reach it
        assert n - 2 * rank < 1 or 1 - 2 * stats.binom.cdf(rank, n, 0.5) < level
    else:
        assert rank == 1


def test_few_repeats_do_not_claim_a_level_that_they_lack() -> None:
    assert measured([1.0, 2.0, 3.0]).level == pytest.approx(0.75)
    assert measured([1.0]).level == 0.0
    assert measured([1.0] * 6).level == pytest.approx(1 - 2 / 64)


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [1.0, math.inf]])
def test_no_median_of_nothing_or_of_nan(samples: list[float]) -> None:
    with pytest.raises(WorkError):
        measured(samples)


def test_abba_order_and_what_comes_back() -> None:
    calls = count()
    rounds = abba(lambda: ("a", next(calls)), lambda: ("b", next(calls)), 2)
    assert rounds == [
        (("a", 0), ("b", 1), ("b", 2), ("a", 3)),
        (("a", 4), ("b", 5), ("b", 6), ("a", 7)),
    ]


def test_in_turns_leaves_the_warm_up_out() -> None:
    calls = count()
    first, second = in_turns([lambda: next(calls), lambda: next(calls)], repeats=2, warm_up=3)
    assert (first, second) == ([6, 9, 10, 13], [7, 8, 11, 12])
    calls = count()
    assert in_turns([lambda: next(calls)], repeats=3, warm_up=2) == [[2, 3, 4]]


def test_a_steady_drift_cancels_out_of_the_ratio() -> None:
    clock = count(100)  # every call takes one second more than the one before; both models are equally fast
    first, second = in_turns([lambda: float(next(clock)), lambda: float(next(clock))], repeats=10, warm_up=0)
    assert round_ratios(first, second) == pytest.approx([1.0] * 10, abs=1e-12)
    blocked = round_ratios(sorted([*first, *second])[:20], sorted([*first, *second])[20:])
    assert min(blocked) > 1.1  # measured one after the other, the second would look slower


def test_ratios_by_hand() -> None:
    assert round_ratios([1.0, 3.0, 2.0, 2.0], [4.0, 4.0, 1.0, 1.0]) == [2.0, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [10, 20])
@pytest.mark.parametrize("spread", ["lognormal", "heavy"])
def test_coverage_by_simulation(rounds: int, spread: str) -> None:
    """True median 1: the interval holds it at its level, and the bootstrap that it replaces does not."""
    rng = np.random.default_rng(rounds)
    runs = 10_000
    noise = 0.1 * rng.normal(size=(runs, rounds)) if spread == "lognormal" else 0.05 * rng.standard_t(2, (runs, rounds))
    values = np.exp(noise)
    found = [median_interval(list(row)) for row in values]
    covered = np.mean([each.low <= 1.0 <= each.high for each in found])
    assert covered == pytest.approx(found[0].level, abs=0.01)
    assert covered >= 0.95 - 0.005
    boot = []
    for row in values[:3000]:
        medians = np.median(row[rng.integers(0, rounds, (500, rounds))], axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        boot.append(low <= 1.0 <= high)
    assert np.mean(boot) < 0.95


def test_what_the_limit_leaves_out_by_hand() -> None:
    now = [0.0]
    limit = Limit(10.0, lambda: now[0])

    def run() -> float:
        now[0] += 1.0
        return now[0]

    part = limit.part(0.5)
    assert in_turns([run], 9, 1, part.over) == [[2.0, 3.0, 4.0]], "a fifth would end at 5 s, which is the end"
    assert (limit.spent(), limit.left(), limit.left(0.5)) == (4.0, 6.0, 1.0)
    assert in_turns([run, run], 9, 3, limit.part(0.5).over) == [[6.0, 9.0], [7.0, 8.0]], "one of warm-up, one round"
    assert in_turns([run], 3, 2, Limit(None, lambda: now[0]).part(0.1).over) == [[12.0, 13.0, 14.0]]
