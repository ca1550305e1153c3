"""The accuracy of one model with its interval, and how much of it above guessing a compressed model keeps."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from compress.errors import WorkError
from compress.evaluation.statistics.interval import LEVEL, Interval, two_sided_z
from compress.evaluation.statistics.paired import by_cluster, pairs_of
from compress.evaluation.statistics.ratios import ratio

RECOVERY_ERRORS = 2.0


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Score interval of a share, `successes` of `n` (Wilson 1927, J. Am. Stat. Assoc. 22).

    Raises:
        WorkError: no item, or successes outside 0 .. n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise WorkError(f"{successes} of {n} is no share", "score at least one item")
    z2 = two_sided_z(level) ** 2
    share = successes / n
    centre = (successes + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * n) / (n + z2) * math.sqrt(share * (1 - share) + z2 / (4 * n))
    low = 0.0 if successes == 0 else centre - half
    return Interval(share, low, 1.0 if successes == n else centre + half, level)


def errors_above_chance(successes: int, n: int, chance: float) -> float:
    """By how many standard errors an accuracy exceeds that of guessing, `chance`; negative below it.

    The standard error is the larger of that of guessing and that of the accuracy, the latter with two successes and
    two failures added (Agresti and Coull 1998), so it is never zero.

    Raises:
        WorkError: no item, successes outside 0 .. n, or a chance outside 0 .. 1.
    """
    if n < 1 or not 0 <= successes <= n or not 0 <= chance <= 1:
        raise WorkError(f"{successes} of {n} cannot be held against a chance of {chance:g}", "score the task again")
    smoothed = (successes + 2) / (n + 4)
    variance = max(chance * (1 - chance) / n, smoothed * (1 - smoothed) / (n + 4))
    return (successes / n - chance) / math.sqrt(variance)


def chance_corrected_recovery(
    base: Sequence[int],
    cand: Sequence[int],
    chance: float,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> Interval:
    """(candidate's accuracy - chance) / (baseline's - chance), paired: 1 keeps all that the baseline knows, 0 none.

    base, cand: right (1) or wrong (0) per item; clusters: the group of each item, each item its own if None.

    Raises:
        IntegrityError: columns of different length.
        WorkError: no item, or a baseline within two standard errors of chance: the ratio of two noises tells nothing.
    """
    pairs = pairs_of(base, cand)
    right = pairs.both + pairs.base_only
    above = errors_above_chance(right, pairs.n, chance)
    if above <= RECOVERY_ERRORS:
        raise WorkError(
            f"no recovery can be told: the baseline's accuracy of {right / pairs.n:.3f} is {above:.1f} standard errors "
            f"above the {chance:.3f} of guessing, and more than {RECOVERY_ERRORS:g} are needed",
            "score more items, or a task that the baseline masters",
        )
    groups = range(pairs.n) if clusters is None else clusters
    ours, _ = by_cluster([value - chance for value in cand], groups)
    theirs, _ = by_cluster([value - chance for value in base], groups)
    return ratio(ours, theirs, level)
