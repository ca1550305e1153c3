"""Intervals of ratios of totals over clusters of tokens or items. Free of torch.

Mean KL is total KL over total tokens, and so are all the others, so one estimator serves: the ratio estimator, its
variance by linearisation (Cochran, Sampling Techniques, ch. 6). Comparing two models on the same clusters is the same
estimator on paired sums, which is why paired intervals are tight.

A plain t interval with clusters - 1 degrees of freedom is too short for what is measured here, for two reasons. The
documents of a text differ in length a hundredfold, so a few of them decide: the variance is therefore bias-reduced and
the degrees of freedom follow the lengths (Bell and McCaffrey 2002, Survey Methodology 28; Imbens and Kolesar 2016).
And sums of KL lean to one side, so the upper bound falls short more often than the lower one: the one-term Edgeworth
correction (Hall 1992, The Bootstrap and Edgeworth Expansion, ch. 3) moves a bound, and only ever outwards, because the
skewness of a few tens of clusters is itself uncertain. With equal, symmetric clusters what remains is the t interval
of the mean. Measured in tests/evaluation/test_statistics_coverage.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from compress.errors import WorkError
from compress.evaluation.statistics.interval import LEVEL, Interval, t_quantile, two_sided_z

Values = Sequence[float] | NDArray[np.float64]


def ratio(numerators: Values, denominators: Values, level: float = LEVEL) -> Interval:
    """Interval of sum(numerators) / sum(denominators), one pair per cluster.

    Examples: mean KL = ratio(kl sums, tokens); the KL of one artifact over another's = ratio(their kl sums).

    Raises:
        WorkError: fewer than two clusters, a value that is not finite, denominators that sum to zero, or one cluster
            that holds all of their sum.
        UserError: a level below 0, or 1 and above.
    """
    z = two_sided_z(level)
    estimate, parts, shares = _linearised(numerators, denominators)
    error = _error(parts, shares)
    if error == 0.0:
        return Interval(estimate, estimate, estimate, level)
    half = t_quantile((1 + level) / 2, degrees_of_freedom(shares)) * error
    lean = _skewness(parts) * (1 + 2 * z * z) / 6 * error
    return Interval(estimate, estimate - half + min(lean, 0.0), estimate + half + max(lean, 0.0), level)


def ratio_error(numerators: Values, denominators: Values) -> float:
    """Standard error of sum(numerators) / sum(denominators), bias-reduced; raises as `ratio`."""
    _, parts, shares = _linearised(numerators, denominators)
    return _error(parts, shares)


def mean_difference(first: Values, second: Values, tokens: Values, level: float = LEVEL) -> Interval:
    """Paired: interval of the mean per token of `first` minus that of `second`, over the same clusters."""
    ours, theirs = column(first), column(second)
    if len(ours) != len(theirs):
        raise _no_interval(len(ours), len(theirs), math.nan)
    return ratio(ours - theirs, tokens, level)


def perplexity(nll: Values, tokens: Values, level: float = LEVEL) -> Interval:
    """exp of the mean negative log-likelihood, from its sums per cluster."""
    return ratio(nll, tokens, level).exp()


def perplexity_ratio(candidate: Values, baseline: Values, tokens: Values, level: float = LEVEL) -> Interval:
    """Paired: perplexity of the candidate over that of the baseline, from their nll sums on the same clusters."""
    return mean_difference(candidate, baseline, tokens, level).exp()


def share_bounds(counts: Sequence[int], tokens: Sequence[int], alpha: float) -> tuple[float, float]:
    """One-sided lower and upper bounds, each at level 1 - alpha, of a share of tokens that may be rare.

    The wider of the interval over clusters and the exact binomial one (Clopper-Pearson): the first allows for the
    likeness of neighbouring tokens, the second for the fact that clusters without a single hit show no variance.
    """
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    hits, total = sum(counts), sum(tokens)
    clustered = ratio(counts, tokens, 1 - 2 * alpha)
    low = 0.0 if hits == 0 else float(betaincinv(hits, total - hits + 1, alpha))
    high = 1.0 if hits == total else float(betaincinv(hits + 1, total - hits, 1 - alpha))
    return max(0.0, min(clustered.low, low)), min(1.0, max(clustered.high, high))


def column(values: Values) -> NDArray[np.float64]:
    """The values as a float64 vector."""
    return np.asarray(values, dtype=np.float64)


def degrees_of_freedom(shares: NDArray[np.float64]) -> float:
    """Degrees of freedom of the bias-reduced variance, from each cluster's share of the denominators (clusters,).

    Satterthwaite's 2 mean^2 / variance of the variance estimate, where clusters differ by a common spread times their
    size (documents differ in kind, not only by the chance of their tokens): the cautious end. Equal clusters: their
    number - 1. With the article lengths of WikiText-2's test set (62): 18.
    """
    sizes = shares * shares
    weights = 1 / (1 - shares)
    # The residuals' covariance is diag(sizes) - shares k' - k shares', so no matrix of clusters x clusters is needed.
    k = sizes - sizes.sum() / 2 * shares
    trace = float(weights @ (sizes - 2 * shares * k))
    squared = float(weights**2 @ (sizes**2 - 4 * sizes * shares * k))
    squared += 2 * float((weights @ shares**2) * (weights @ k**2) + (weights @ (shares * k)) ** 2)
    return trace * trace / squared


def _linearised(y: Values, x: Values) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """The ratio; what each cluster adds to its error (clusters,); each cluster's share of the denominators."""
    y, x = column(y), column(x)
    total = float(x.sum())
    if len(y) != len(x) or len(y) < 2 or total == 0.0 or not (np.isfinite(y).all() and np.isfinite(x).all()):
        raise _no_interval(len(y), len(x), total)
    shares = x / total
    if float(shares.max()) >= 1.0:
        raise _no_interval(1, 1, total)
    estimate = float(y.sum()) / total
    return estimate, (y - estimate * x) / total, shares


def _error(parts: NDArray[np.float64], shares: NDArray[np.float64]) -> float:
    return math.sqrt(float((parts * parts / (1 - shares)).sum()))


def _skewness(parts: NDArray[np.float64]) -> float:
    """Skewness of the sum of the parts, each a sample of one; 0 where they are all 0."""
    scaled = parts / float(np.abs(parts).max())
    return float((scaled**3).sum()) / float((scaled**2).sum()) ** 1.5


def _no_interval(numerators: int, denominators: int, total: float) -> WorkError:
    return WorkError(
        f"no interval can be computed from {numerators} and {denominators} cluster sums that total {total}",
        "score at least two clusters of tokens or items, all of them finite",
    )
