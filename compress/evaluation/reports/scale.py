"""Losses in one unit, so that gates about different things stand on one axis: the share of what the limit allows.

0 is no loss, 1 is exactly the limit, more is beyond it. A KL of 0.016 where 0.02 is allowed is 0.8; a top-1 agreement
of 90.5% where 89% is asked is 9.5 / 11 = 0.86; a size ratio of 2.5 where 2 is asked is 2 / 2.5 = 0.8.
"""

from __future__ import annotations

import math

SHARES = frozenset({"top1_agreement", "generation_identical"})
"""Kinds of gate whose value is a share and whose best value is 1."""


def loss_share(value: float | None, limit: float, rule: str, kind: str = "") -> float | None:
    """The share of the allowed loss that `value` is; None where that has no meaning (no value, a limit of zero)."""
    if value is None or not math.isfinite(value):
        return None
    if kind in SHARES and rule == "at least" and limit < 1.0:
        return (1.0 - value) / (1.0 - limit)
    if limit == 0.0:
        return None
    if (rule == "at most") == (limit > 0.0):
        return value / limit  # a budget, or a margin: the loss itself is limited
    if value * limit <= 0.0:
        return math.inf  # a ratio that fell to nothing, or a loss where a gain was asked
    return limit / value


def worse(rule: str) -> int:
    """+1 where larger values are worse, -1 where smaller ones are."""
    return 1 if rule == "at most" else -1
