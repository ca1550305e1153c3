"""What it takes to decide: how many tokens, items or prompts a limit needs, given what was seen or is expected."""

from __future__ import annotations

import math

from compress.evaluation.measures import Measure

POWER = 0.8


def power_of(found: Measure, alpha: float) -> str | None:
    """`needs 3,092 items for 1 point at flips 5%; has 500`, or None where nothing depends on how much is measured."""
    if found.exact or not found.size:
        return None
    needed = needed_size(found, alpha)
    if needed is None:
        return None
    if found.flips is not None:
        return items_message(needed, -found.limit, found.flips, found.size)
    return f"needs about {needed:,} {found.counted} at this estimate; has {found.size:,}"


def needed_size(found: Measure, alpha: float) -> int | None:
    """How many tokens (items, prompts) would decide at this estimate; None where no number can be told."""
    if found.flips is not None and found.part is None and found.unit == "points":
        return items_needed(-found.limit, smoothed(found.flips, found.size or 1), alpha)
    low, high = found.bounds(alpha)
    if found.unit == "share" and low <= 0 and high >= 1:  # nothing is known yet, so nothing can be foretold
        return None
    above = found.limit >= found.estimate
    half = (high - found.estimate) if above else (found.estimate - low)
    room = abs(found.limit - found.estimate)
    if not math.isfinite(half) or half <= 0 or room == 0 or not found.size:
        return None
    from compress.evaluation.statistics import tokens_needed

    return tokens_needed(half, found.size, room)


def smoothed(flips: float, items: int) -> float:
    """A share of flips that is never zero: none among n items is no promise that there are none (add one half)."""
    return (flips * items + 0.5) / (items + 1)


def items_needed(margin: float, flips: float, alpha: float) -> int | None:
    """Items that prove a loss of less than `margin` points with 80% power when the truth is no loss; None for 0."""
    if margin <= 0:
        return None
    if margin >= 100:
        return 1
    from compress.evaluation.statistics import items_needed as needed

    return needed(margin / 100, flips, alpha, POWER)


def items_message(needed: int, margin: float, flips: float, has: int) -> str:
    """The sentence about items."""
    points = "1 point" if margin == 1 else f"{margin:g} points"
    return f"needs {needed:,} items for {points} at flips {100 * flips:.3g}%; has {has:,}"


def without_hits(share: float, alpha: float) -> int | None:
    """Independent observations without a single hit that prove a share of hits of at most `share` (exact binomial)."""
    if share <= 0:
        return None
    return 1 if share >= 1 else math.ceil(math.log(alpha) / math.log1p(-share))
