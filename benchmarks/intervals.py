"""Paired block bootstrap: means, ratios and recoveries of per-block sums with 95% intervals.

Blocks of 2,048 consecutive tokens are the unit of resampling, because tokens of one passage are not independent.
A comparison resamples the same blocks for both sides, so what both find hard cancels out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with the 2.5% and 97.5% points of its bootstrap distribution."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def estimate(statistic: Callable[..., Array], *columns: Array) -> Estimate:
    """`statistic` of the column means, resampled over blocks.

    Each column (blocks,) holds per-block sums; `statistic` gets one mean per column, as arrays (resamples,), and must
    work elementwise. The resampling is seeded: the same blocks give the same interval.
    """
    blocks = len(columns[0])
    drawn = np.random.default_rng(0).integers(0, blocks, size=(RESAMPLES, blocks))
    samples = statistic(*(column[drawn].mean(axis=1) for column in columns))
    low, high = np.percentile(samples, [2.5, 97.5])
    point = statistic(*(np.asarray(column.mean()) for column in columns))
    return Estimate(float(point), float(low), float(high))


def mean_per_token(sums: Array, tokens: Array) -> Estimate:
    """The mean per token of a per-block sum."""
    return estimate(lambda total, count: total / count, sums, tokens)


def ratio(ours: Array, theirs: Array) -> Estimate:
    """Ours over theirs, paired."""
    return estimate(lambda a, b: a / b, ours, theirs)


def recovery(candidate: Array, rtn: Array) -> Estimate:
    """1 - KL / KL_RTN, paired: the share of RTN's loss that the method wins back."""
    return estimate(lambda a, b: 1 - a / b, candidate, rtn)


def outlier_recovery(method_twin: Array, rtn_twin: Array, rtn_plain: Array) -> Estimate:
    """Share of the KL that the outlier twin adds to RTN which the method wins back on the twin, paired.

    1 means as good as RTN on the model without outliers, 0 as bad as RTN on the twin.
    """
    return estimate(lambda m, t, p: (t - m) / (t - p), method_twin, rtn_twin, rtn_plain)
