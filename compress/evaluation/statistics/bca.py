"""Bootstrap interval of a ratio of totals over clusters, bias-corrected and accelerated.

A second opinion beside `ratio`, which assumes less about how clusters are distributed, and more about their number:
the plain interval (Efron 1987, Better bootstrap confidence intervals, J. Am. Stat. Assoc. 82) resamples the residuals
of a few tens of clusters as they are, too small by the degrees of freedom, and covers 92.5 to 93.5% for 95% with 42
equal clusters and 91 to 94.5% with 60 documents of unequal length. Here the normal quantile is therefore widened to
that of the t distribution (Hesterberg 2015, What teachers should know about the bootstrap, Am. Stat. 69, for percentile
intervals), with the variance and the degrees of freedom that `ratio` has: 94 to 95%.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError, WorkError
from compress.evaluation.statistics.interval import LEVEL, Interval, t_quantile, two_sided_z
from compress.evaluation.statistics.ratios import Values, column, degrees_of_freedom, ratio

DRAWS = 10_000
FEWEST_DRAWS = 1_000
CHUNK = 1 << 22


def bca_ratio(
    numerators: Values,
    denominators: Values,
    level: float = LEVEL,
    seed: int = 0,
    draws: int = DRAWS,
    *,
    widen: bool = True,
) -> Interval:
    """Interval of sum(numerators) / sum(denominators), one pair per cluster, from `draws` resamples of the clusters.

    widen: allow for the number and the lengths of the clusters; False gives Efron's interval. The same arguments give
    the same interval with the same numpy. An end beyond all draws is unknown: infinite.

    Raises:
        WorkError: as `ratio`, or a resample whose denominators sum to zero.
        UserError: a level below 0, or 1 and above, or fewer than 1,000 draws.
    """
    return bca_at(numerators, denominators, seed, draws, widen=widen)(level)


def bca_at(
    numerators: Values, denominators: Values, seed: int = 0, draws: int = DRAWS, *, widen: bool = True
) -> Callable[[float], Interval]:
    """level -> the interval of `bca_ratio`, all levels from the same resamples; raises as `bca_ratio`."""
    from scipy.special import ndtr, ndtri  # type: ignore[import-untyped]

    estimate = ratio(numerators, denominators).estimate
    if draws < FEWEST_DRAWS:
        raise UserError(f"{draws} draws are too few for a bootstrap interval", f"take {FEWEST_DRAWS:,} draws or more")
    y, x = column(numerators), column(denominators)
    resampled = np.sort(_resampled(y, x, seed, draws))
    below = float((resampled < estimate).mean() + (resampled == estimate).mean() / 2)
    bias = float(ndtri(min(max(below, 0.5 / draws), 1 - 0.5 / draws)))
    acceleration, shortfall, freedom = _acceleration(y, x), _shortfall(y, x, estimate), degrees_of_freedom(x / x.sum())

    def interval(level: float) -> Interval:
        z = two_sided_z(level)
        if widen:
            z = t_quantile((1 + level) / 2, freedom) * shortfall
        tails = bias + np.array([-z, z])
        bend = 1 - acceleration * tails  # at 0 the tail has passed all resamples
        ends = np.where(bend > 0, bias + tails / np.where(bend > 0, bend, 1.0), np.copysign(np.inf, tails))
        low, high = ndtr(ends)
        return Interval(
            estimate,
            float(np.quantile(resampled, low)) if low * draws >= 1 else -np.inf,
            float(np.quantile(resampled, high)) if (1 - high) * draws >= 1 else np.inf,
            level,
        )

    return interval


def _resampled(y: NDArray[np.float64], x: NDArray[np.float64], seed: int, draws: int) -> NDArray[np.float64]:
    """The ratio of each resample (draws,): how often each cluster was drawn is multinomial."""
    random = np.random.default_rng(seed)
    clusters = len(y)
    even = np.full(clusters, 1 / clusters)
    parts = []
    for start in range(0, draws, size := max(1, CHUNK // clusters)):
        weights = random.multinomial(clusters, even, size=min(size, draws - start)).astype(np.float64)
        totals = weights @ x
        if (totals == 0.0).any():
            raise WorkError(
                "no bootstrap interval: some resamples of the clusters have nothing to divide by",
                "score more clusters",
            )
        parts.append((weights @ y) / totals)
    return np.concatenate(parts)


def _acceleration(y: NDArray[np.float64], x: NDArray[np.float64]) -> float:
    """From the ratios that leave one cluster out; 0 where they are all the same."""
    without = (y.sum() - y) / (x.sum() - x)
    spread = without.mean() - without
    largest = float(np.abs(spread).max())
    if largest == 0.0:
        return 0.0
    spread = spread / largest
    return float((spread**3).sum()) / (6 * float((spread**2).sum()) ** 1.5)


def _shortfall(y: NDArray[np.float64], x: NDArray[np.float64], estimate: float) -> float:
    """The bias-reduced standard error over that which resampling shows; 1 where there is none."""
    squares = (y - estimate * x) ** 2
    total = float(squares.sum())
    return float(np.sqrt((squares / (1 - x / x.sum())).sum() / total)) if total else 1.0
