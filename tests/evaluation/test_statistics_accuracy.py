"""Accuracy of one model against statsmodels, and recovery above chance with its refusal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from compress.errors import IntegrityError, UserError, WorkError
from compress.evaluation.statistics import chance_corrected_recovery, errors_above_chance, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (10, 10), (250, 1000), (67, 68), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_statsmodels(successes: int, n: int, level: float) -> None:
    low, high = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    found = wilson(successes, n, level)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert found.estimate == successes / n
    assert 0.0 <= found.low <= found.estimate <= found.high <= 1.0


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_what_is_no_share_is_refused(successes: int, n: int) -> None:
    with pytest.raises(WorkError, match="is no share"):
        wilson(successes, n)
    with pytest.raises(WorkError, match="chance"):
        errors_above_chance(successes, n, 0.25)
    with pytest.raises(UserError, match="level"):
        wilson(1, 5, 1.5)


def test_standard_errors_above_chance() -> None:
    assert errors_above_chance(300, 1000, 0.25) == pytest.approx(
        0.05 / math.sqrt(302 / 1004 * 702 / 1004 / 1004), rel=1e-12
    )
    assert errors_above_chance(990, 1000, 0.5) == pytest.approx(0.49 / math.sqrt(0.25 / 1000))
    assert errors_above_chance(250, 1000, 0.25) == 0.0
    assert errors_above_chance(200, 1000, 0.25) < -3
    assert 0 < errors_above_chance(1, 1000, 0.0) < 1  # one hit where guessing never hits is not yet knowledge
    assert 5 < errors_above_chance(1000, 1000, 0.0) < math.inf
    with pytest.raises(WorkError, match="chance"):
        errors_above_chance(1, 10, math.nan)


def answers(random: np.random.Generator, n: int, kept: float) -> tuple[list[int], list[int]]:
    """Four choices. The baseline knows 40% and guesses the rest; the candidate knows `kept` of what the baseline
    knows, and gives the baseline's guess on three of four others."""
    knows = random.random(n) < 0.4
    still = knows & (random.random(n) < kept)
    guess = random.random(n) < 0.25
    other = np.where(random.random(n) < 0.75, guess, random.random(n) < 0.25)
    return (knows | guess).astype(int).tolist(), (still | other).astype(int).tolist()


@pytest.mark.parametrize("runs", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_recovery_is_the_share_of_knowledge_that_is_kept(runs: int) -> None:
    """Its interval covers that share: 0.9 here, where the ratio of the accuracies is 0.945."""
    random = np.random.default_rng(6)
    hits, estimates = 0, []
    for _ in range(runs):
        found = chance_corrected_recovery(*answers(random, 400, 0.9), 0.25)
        hits += found.low <= 0.9 <= found.high
        estimates.append(found.estimate)
    assert np.mean(estimates) == pytest.approx(0.9, abs=0.01)
    assert hits / runs >= 0.935 - (2 * math.sqrt(0.05 * 0.95 / runs) if runs < 10_000 else 0)


def test_recovery_of_the_same_answers_is_exactly_one() -> None:
    base = [1] * 60 + [0] * 40
    found = chance_corrected_recovery(base, base, 0.25)
    assert (found.estimate, found.low, found.high) == (1.0, 1.0, 1.0)


def test_recovery_over_clusters_allows_for_items_that_fall_together() -> None:
    base = [1] * 300 + [0] * 100
    cand = [0] * 20 + base[20:]
    apart = chance_corrected_recovery(base, cand, 0.25)
    together = chance_corrected_recovery(base, cand, 0.25, [i // 20 for i in range(400)])
    assert together.estimate == pytest.approx(apart.estimate) == pytest.approx((280 - 100) / 200)
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_near_chance_there_is_no_recovery() -> None:
    base = [1] * 280 + [0] * 720
    with pytest.raises(WorkError, match=r"0\.280 is 2\.\d standard errors above the 0\.250 of guessing|no recovery"):
        chance_corrected_recovery([1] * 270 + [0] * 730, [1] * 260 + [0] * 740, 0.25)
    assert chance_corrected_recovery(base, base, 0.25).estimate == 1.0
    with pytest.raises(WorkError, match="no recovery"):
        chance_corrected_recovery([0] * 50, [1] * 50, 0.0)
    with pytest.raises(IntegrityError, match="paired"):
        chance_corrected_recovery(base, base[1:], 0.25)
    with pytest.raises(IntegrityError, match="cluster names"):
        chance_corrected_recovery(base, base, 0.25, ["a"])
