"""Sample sizes keep what they promise: the power of the gate's own interval, summed over all outcomes."""

from __future__ import annotations

import math

import pytest

from compress.errors import UserError
from compress.evaluation.statistics import items_needed, paired_difference, smallest_drop, tokens_needed
from compress.evaluation.statistics.paired import Pairs
from tests.evaluation.test_statistics_paired import outcomes


def passes(n: int, flips: float, drop: float, margin: float) -> float:
    """Probability that `n` items show a true `drop` to be less than `margin`."""
    return sum(p for b, c, p in outcomes(n, flips, -drop) if paired_difference(Pairs(n, 0, b, c), 0.9).low > -margin)


def shown(n: int, flips: float, drop: float) -> float:
    """Probability that `n` items show a true `drop` to be a loss."""
    return sum(p for b, c, p in outcomes(n, flips, -drop) if paired_difference(Pairs(n, 0, b, c), 0.9).high < 0)


@pytest.mark.parametrize(
    ("margin", "flips", "drop"), [(0.02, 0.02, 0.0), (0.02, 0.05, 0.0), (0.03, 0.10, 0.0), (0.03, 0.05, 0.01)]
)
def test_items_needed_have_the_power(margin: float, flips: float, drop: float) -> None:
    n = items_needed(margin, flips, 0.05, 0.8, drop)
    assert 0.79 <= passes(n, flips, drop, margin) <= 0.85
    assert passes(n * 2 // 3, flips, drop, margin) < 0.75


def test_the_shorter_formula_promises_too_much() -> None:
    """(z + z)^2 flips / margin^2 gives 310 items for 2 points at flips 2%: two cases of three, not four of five."""
    assert passes(310, 0.02, 0.0, 0.02) < 0.70
    assert items_needed(0.02, 0.02, 0.05) == 425


def test_for_margins_far_below_the_flips_both_formulas_agree() -> None:
    assert items_needed(0.005, 0.10, 0.05) == pytest.approx(24_731, rel=0.002)
    assert items_needed(0.01, 0.10, 0.05) == pytest.approx(6_183, rel=0.006)


def test_more_power_smaller_margins_and_real_losses_take_more_items() -> None:
    base = items_needed(0.02, 0.05, 0.05)
    assert items_needed(0.02, 0.05, 0.05, 0.9) > base
    assert items_needed(0.02, 0.05, 0.01) > base
    assert items_needed(0.02, 0.06, 0.05) > base
    assert items_needed(0.02, 0.05, 0.05, drop=0.01) > 3 * base
    assert items_needed(0.02, 0.05, 0.05, drop=-0.01) < base  # a candidate that is better
    assert items_needed(0.02, 0.0, 0.05) == math.ceil(1.6448536**2 * 0.98 / 0.02)  # no flips at all still takes some


@pytest.mark.parametrize(("n", "flips"), [(200, 0.05), (500, 0.02), (500, 0.10), (1000, 0.05)])
def test_the_smallest_drop_is_shown_with_the_power(n: int, flips: float) -> None:
    drop = smallest_drop(n, flips, 0.05)
    assert 0.79 <= shown(n, max(flips, drop), drop) <= 0.85
    assert shown(n, max(flips, drop), drop * 0.8) < 0.75


def test_the_smallest_drop_is_that_of_the_known_formula_where_flips_allow_it() -> None:
    for n, flips in ((1000, 0.02), (1000, 0.10), (10_042, 0.05)):
        assert smallest_drop(n, flips, 0.05) == pytest.approx((1.6449 + 0.8416) * math.sqrt(flips / n), rel=0.01)
    few = smallest_drop(100, 0.02, 0.05)
    assert few == pytest.approx(smallest_drop(100, 0.0, 0.05))  # no smaller than what a hundred items can show at all
    assert few == pytest.approx(0.0605, abs=1e-4)
    assert smallest_drop(1, 0.5, 0.05) == 1.0


def test_tokens_grow_with_the_square_of_the_precision() -> None:
    assert tokens_needed(0.02, 10_000, 0.01) == 40_000
    assert tokens_needed(0.01, 10_000, 0.02) == 2_500
    assert tokens_needed(0.0, 10_000, 0.02) == 1


@pytest.mark.parametrize(
    ("margin", "flips", "alpha", "power", "drop"),
    [
        (0.0, 0.05, 0.05, 0.8, 0.0),
        (0.01, 0.05, 0.05, 0.8, 0.01),
        (0.01, 0.05, 0.05, 0.8, 0.06),
        (0.01, -0.1, 0.05, 0.8, 0.0),
        (0.01, 0.05, 0.5, 0.8, 0.0),
        (0.01, 0.05, math.nan, 0.8, 0.0),
        (0.01, 0.05, 0.05, 1.0, 0.0),
    ],
)
def test_plans_that_no_number_of_items_meets_are_refused(
    margin: float, flips: float, alpha: float, power: float, drop: float
) -> None:
    with pytest.raises(UserError):
        items_needed(margin, flips, alpha, power, drop)


def test_other_impossible_plans_are_refused() -> None:
    for n, flips, alpha in ((0, 0.05, 0.05), (10, 1.5, 0.05), (10, 0.05, 0.9)):
        with pytest.raises(UserError):
            smallest_drop(n, flips, alpha)
    for half, tokens, wanted in ((0.1, 100, 0.0), (math.nan, 100, 0.1), (0.1, 0, 0.1), (math.inf, 10, 0.1)):
        with pytest.raises(UserError):
            tokens_needed(half, tokens, wanted)
