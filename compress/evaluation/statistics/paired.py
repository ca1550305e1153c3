"""Two models on the same items: how much accuracy was lost, with an interval, and whether it was chance.

Only the items on which the two differ tell anything: b that the baseline alone has right, c that the candidate alone
has. The change of accuracy is (c - b) / n; all intervals here are of that, as a share (0.01 is one point).

Agresti and Min's interval covers too rarely where nearly all flips go one way, on the side of zero; Tango's in the same
place, on the other side. `paired_difference` takes the outer bound of the two and holds its level everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from compress.errors import IntegrityError, WorkError
from compress.evaluation.statistics.interval import LEVEL, Interval, hull, two_sided_z
from compress.evaluation.statistics.ratios import ratio

TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Pairs:
    """n items: `both` that both models have right, `base_only` that the baseline alone has, `cand_only` likewise."""

    n: int
    both: int
    base_only: int
    cand_only: int

    @property
    def difference(self) -> float:
        """Accuracy of the candidate minus that of the baseline."""
        return (self.cand_only - self.base_only) / self.n

    @property
    def flips(self) -> float:
        """Share of items on which one is right and the other wrong."""
        return (self.cand_only + self.base_only) / self.n


def pairs_of(base: Sequence[int], cand: Sequence[int]) -> Pairs:
    """Counts from right (1) or wrong (0) per item, in the same order of items for both models.

    Raises:
        IntegrityError: another number of items.
        WorkError: no item, or a value that is neither 0 nor 1.
    """
    if len(base) != len(cand):
        raise IntegrityError(
            f"{len(base)} items of the baseline cannot be paired with {len(cand)} of the candidate",
            "score both on the same items",
        )
    if not base:
        raise WorkError("no item was scored, so no accuracy can be compared", "score at least one item")
    if any(value not in (0, 1) for value in (*base, *cand)):
        raise WorkError("an item is marked neither right (1) nor wrong (0)", "score the task again")
    pairs = list(zip(base, cand, strict=True))
    return Pairs(len(pairs), *(sum(pair == wanted for pair in pairs) for wanted in ((1, 1), (1, 0), (0, 1))))


def paired_difference(pairs: Pairs, level: float = LEVEL) -> Interval:
    """Interval of the change of accuracy: the outer bounds of `agresti_min` and `tango`.

    Coverage (exact, n = 100 .. 1000, flips 1 .. 20%, any drop up to all flips): a one-sided 95% bound covers 94.0% or
    more.
    """
    return hull(agresti_min(pairs, level), tango(pairs, level))


def agresti_min(pairs: Pairs, level: float = LEVEL) -> Interval:
    """Interval of the change of accuracy, half an item added to each of the four counts.

    Agresti and Min 2005, Simple improved confidence intervals for comparing matched proportions, Stat. Med. 24.
    """
    n, lost, won = pairs.n + 2, pairs.base_only + 0.5, pairs.cand_only + 0.5
    centre = (won - lost) / n
    half = two_sided_z(level) * math.sqrt(lost + won - (won - lost) ** 2 / n) / n
    return Interval(pairs.difference, max(-1.0, centre - half), min(1.0, centre + half), level)


def tango(pairs: Pairs, level: float = LEVEL) -> Interval:
    """Score interval of the change of accuracy: all changes that a score test at 1 - level does not refuse.

    Tango 1998, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Stat. Med. 17.
    """
    z, found = two_sided_z(level), pairs.difference
    return Interval(found, _where_score_is(z, pairs, -1 + TINY), _where_score_is(-z, pairs, 1 - TINY), level)


def _where_score_is(z: float, pairs: Pairs, end: float) -> float:
    """The change at which the score is `z`, between `end` (near -1 or 1), towards which the score grows without
    bound, and the change found, where it is 0."""
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    found = pairs.difference
    near = found + math.copysign(TINY, end)
    if abs(near) >= abs(end) and near * end > 0:
        return math.copysign(1.0, end)
    if abs(score(pairs, near)) >= abs(z):
        return found
    return float(brentq(lambda change: score(pairs, change) - z, end, near, xtol=TINY))


def score(pairs: Pairs, change: float) -> float:
    """Tango's statistic: the deviation from `change`, in the standard errors that a true `change` would give."""
    lost = lost_share(pairs.base_only / pairs.n, pairs.cand_only / pairs.n, change)
    variance = pairs.n * (2 * lost + change * (1 - change))
    return (pairs.cand_only - pairs.base_only - pairs.n * change) / math.sqrt(max(variance, math.ulp(0.0)))


def lost_share(base_only: float, cand_only: float, change: float) -> float:
    """Likeliest share of items that the baseline alone has right, given the shares seen and a true `change`.

    The root of Tango's quadratic, written so that nothing cancels. The other share is this plus `change`.
    """
    linear = (2 - cand_only + base_only) * change - base_only - cand_only
    constant = -base_only * change * (1 - change)
    root = math.sqrt(max(linear * linear - 8 * constant, 0.0))
    if linear <= 0:
        return (root - linear) / 4
    return -2 * constant / (root + linear)


def mcnemar(pairs: Pairs) -> float:
    """Exact two-sided p-value of no change: of the flips, as many as these or more go one way by tossing a coin."""
    from scipy.special import bdtr  # type: ignore[import-untyped]

    fewer, flips = min(pairs.base_only, pairs.cand_only), pairs.base_only + pairs.cand_only
    return min(1.0, 2 * float(bdtr(fewer, flips, 0.5))) if flips else 1.0


def mcnemar_midp(pairs: Pairs) -> float:
    """As `mcnemar`, counting what was seen itself by half: less cautious, closer to its level (Fagerland et al. 2013,
    BMC Med. Res. Methodol. 13)."""
    from scipy.special import bdtr

    fewer, flips = min(pairs.base_only, pairs.cand_only), pairs.base_only + pairs.cand_only
    if not flips:
        return 1.0
    return float(bdtr(fewer, flips, 0.5)) + (float(bdtr(fewer - 1, flips, 0.5)) if fewer else 0.0)


def clustered_difference(
    base: Sequence[int], cand: Sequence[int], clusters: Sequence[Hashable], level: float = LEVEL
) -> Interval:
    """Interval of the change of accuracy where items belong together, `clusters` naming the group of each.

    The outer bounds of the ratio estimator over clusters and of `paired_difference`: the first allows for the likeness
    of an item's neighbours, the second for the fact that few flips, or none, show too little variance.

    Raises:
        IntegrityError: columns of different length.
        WorkError: no item, values other than 0 and 1, or fewer than two clusters.
    """
    pairs = pairs_of(base, cand)
    changes, counts = by_cluster([ours - theirs for theirs, ours in zip(base, cand, strict=True)], clusters)
    return hull(paired_difference(pairs, level), ratio(changes, counts, level))


def by_cluster(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[list[float], list[int]]:
    """Sum of the values and number of items per cluster, clusters in order of first appearance.

    Raises:
        IntegrityError: not one cluster for each value.
    """
    if len(values) != len(clusters):
        raise IntegrityError(f"{len(values)} items with {len(clusters)} cluster names", "score the task again")
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0) + value
        counts[cluster] = counts.get(cluster, 0) + 1
    return list(sums.values()), list(counts.values())
