"""Intervals over blocks of tokens. Free of torch.

All quantities are ratios of block totals (mean KL = total KL / total tokens), so one estimator serves: the ratio
estimator with blocks as clusters, its variance by linearisation, Student t with blocks - 1 degrees of freedom
(Cochran, Sampling Techniques, ch. 6). Comparing two models on the same blocks is the same estimator on paired sums,
which is why paired intervals are tight. With tens of blocks the t interval covers better than a percentile bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.errors import WorkError

Values = Sequence[float] | NDArray[np.float64]

LEVEL = 0.95
MAX_EXPONENT = 709.0


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its two-sided confidence interval; low and high are also one-sided bounds at (1 + level) / 2."""

    estimate: float
    low: float
    high: float
    level: float

    def exp(self) -> Interval:
        """The interval of e to this quantity; exact, because exp is monotone. Saturates near the largest float."""
        low, estimate, high = (math.exp(min(value, MAX_EXPONENT)) for value in (self.low, self.estimate, self.high))
        return Interval(estimate, low, high, self.level)


def ratio(numerators: Values, denominators: Values, level: float = LEVEL) -> Interval:
    """Interval of sum(numerators) / sum(denominators), one pair per block.

    Examples: mean KL = ratio(kl sums, tokens); the KL of one artifact over another's = ratio(their kl sums).

    Raises:
        WorkError: fewer than two blocks, a value that is not finite, or denominators that sum to zero.
    """
    y, x = _column(numerators), _column(denominators)
    total = float(x.sum())
    if len(y) != len(x) or len(y) < 2 or total == 0.0 or not (np.isfinite(y).all() and np.isfinite(x).all()):
        raise WorkError(
            f"no interval can be computed from {len(y)} and {len(x)} block sums that total {total}",
            "score at least two blocks of tokens, all of them finite",
        )
    estimate = float(y.sum()) / total
    residuals = y - estimate * x
    blocks = len(y)
    error = math.sqrt(blocks / (blocks - 1) * float(residuals @ residuals)) / abs(total)
    half = t_quantile((1 + level) / 2, blocks - 1) * error
    return Interval(estimate, estimate - half, estimate + half, level)


def mean_difference(
    first: Sequence[float], second: Sequence[float], tokens: Sequence[float], level: float = LEVEL
) -> Interval:
    """Paired: interval of the mean per token of `first` minus that of `second`, over the same blocks."""
    return ratio(_column(first) - _column(second), tokens, level)


def perplexity(nll: Sequence[float], tokens: Sequence[float], level: float = LEVEL) -> Interval:
    """exp of the mean negative log-likelihood, from its sums per block."""
    return ratio(nll, tokens, level).exp()


def perplexity_ratio(
    candidate: Sequence[float], baseline: Sequence[float], tokens: Sequence[float], level: float = LEVEL
) -> Interval:
    """Paired: perplexity of the candidate over that of the baseline, from their nll sums on the same blocks."""
    return mean_difference(candidate, baseline, tokens, level).exp()


def share_bounds(counts: Sequence[int], tokens: Sequence[int], alpha: float) -> tuple[float, float]:
    """One-sided lower and upper bounds, each at level 1 - alpha, of a share of tokens that may be rare.

    The wider of the block interval and the exact binomial one (Clopper-Pearson): the first allows for the likeness of
    neighbouring tokens, the second for the fact that blocks without a single hit show no variance.
    """
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    hits, total = sum(counts), sum(tokens)
    clustered = ratio(counts, tokens, 1 - 2 * alpha)
    low = 0.0 if hits == 0 else float(betaincinv(hits, total - hits + 1, alpha))
    high = 1.0 if hits == total else float(betaincinv(hits + 1, total - hits, 1 - alpha))
    return max(0.0, min(clustered.low, low)), min(1.0, max(clustered.high, high))


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def _column(values: Values) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)
