"""Repeated measurements: medians with intervals, two things in turns, and the ratio of their times. Free of torch.

Intervals are order statistics: exact for any distribution of times. The percentile bootstrap of a median of ten rounds
covers 93% where it promises 95% (as tests/evaluation/test_cost_timing.py shows by simulation), so it is not used.
"""

from __future__ import annotations

import math
import statistics as stdlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from compress.errors import WorkError
from compress.evaluation.costs.record import Measured
from compress.evaluation.statistics import LEVEL, Interval

T = TypeVar("T")


def measured(samples: Sequence[float], level: float = LEVEL) -> Measured:
    """The median of `samples` with its interval (see `median_interval`).

    Raises:
        WorkError: no samples, or one that is not finite.
    """
    found = median_interval(samples, level)
    return Measured(median=found.estimate, low=found.low, high=found.high, level=found.level, repeats=len(samples))


def median_interval(samples: Sequence[float], level: float = LEVEL) -> Interval:
    """The median and the innermost pair of order statistics that holds it with confidence `level` or more.

    The k-th smallest and the k-th largest of n values enclose the population's median with probability
    1 - 2 P(Binomial(n, 1/2) < k). With fewer than six values no pair reaches 95%; the outermost is given. The
    interval's `level` is the one that its pair has.

    Raises:
        WorkError: no samples, or one that is not finite.
    """
    n, ordered = len(samples), sorted(samples)
    if n == 0 or not all(map(math.isfinite, samples)):
        raise WorkError(f"{n} measurements, or one of them not finite: nothing to take a median of", "measure again")
    rank = max((k for k in range(1, (n + 1) // 2 + 1) if _coverage(n, k) >= level), default=1)
    return Interval(stdlib.median(ordered), ordered[rank - 1], ordered[n - rank], _coverage(n, rank))


def abba(first: Callable[[], T], second: Callable[[], T], rounds: int) -> list[tuple[T, T, T, T]]:
    """Calls both in the order first, second, second, first, `rounds` times; each round's results in that order.

    What drifts steadily (heat, other load) adds as much to the one as to the other within a round.
    """
    return [(first(), second(), second(), first()) for _ in range(rounds)]


def in_turns(
    runs: Sequence[Callable[[], T]], repeats: int, warm_up: int, over: Callable[[], bool] = lambda: False
) -> list[list[T]]:
    """The results of each run in the order of time, those of the warm-up left out.

    One run is repeated; two go through `repeats` rounds of `abba`, so each has twice as many results. From when on
    `over()` holds there is no more warm-up, and no repeat or round but the first.
    """
    for run in runs:
        for _ in range(warm_up):
            if not over():
                run()
    results: list[list[T]] = [[] for _ in runs]
    for number in range(repeats):
        if over() and number:
            break
        if len(runs) == 1:
            results[0].append(runs[0]())
        else:
            ((a, b, c, d),) = abba(runs[0], runs[1], 1)
            results[0] += [a, d]
            results[1] += [b, c]
    return results


def round_ratios(candidate: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Baseline seconds over candidate seconds of each round of two in turns; above 1 the candidate is faster."""
    return [sum(baseline[i : i + 2]) / sum(candidate[i : i + 2]) for i in range(0, len(candidate), 2)]


def _coverage(n: int, k: int) -> float:
    return max(0.0, 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n)
