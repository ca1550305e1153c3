"""How much data a decision takes: items for a margin, the smallest loss that items can show, tokens for a width.

Shares, not points: a margin of one point is 0.01, as is a flip rate of one percent.
"""

from __future__ import annotations

import math

from compress.errors import UserError
from compress.evaluation.statistics.interval import checked_share, normal_quantile
from compress.evaluation.statistics.paired import lost_share

POWER = 0.8


def items_needed(margin: float, flip_rate: float, alpha: float, power: float = POWER, drop: float = 0.0) -> int:
    """Items after which a true loss of `drop` is shown to be less than `margin` with probability `power`.

    flip_rate: share of items on which the two models differ; alpha: one-sided. The sample size of the score test
    (Liu, Hsueh, Hsieh and Chen 2002, Stat. Med. 21), whose variance at the margin is larger than that at `drop`: the
    shorter formula, (z_alpha + z_power)^2 flip_rate / margin^2, promises too much where the margin is not far below
    the flip rate (310 items for 2 points at 2% flips, where 425 are needed).

    Raises:
        UserError: a margin outside 0 .. 1 or not above `drop`, a flip rate outside 0 .. 1 or below `drop`, or an alpha
            or power outside 0 .. 1.
    """
    checked_share(margin, "margin")
    if not 0 <= flip_rate <= 1 or abs(drop) > flip_rate:
        raise UserError(f"a drop of {drop:g} cannot come of a flip rate of {flip_rate:g}", "check the two")
    if margin <= drop:
        raise UserError(
            f"a loss of {drop:g} cannot be shown to be less than {margin:g}", "choose a margin above the expected loss"
        )
    lost, won = (flip_rate + drop) / 2, (flip_rate - drop) / 2
    at_margin = 2 * lost_share(lost, won, -margin) - margin * (1 + margin)
    reach = _z(alpha, "alpha") * math.sqrt(at_margin)
    reach += normal_quantile(checked_share(power, "power")) * math.sqrt(flip_rate - drop * drop)
    return max(1, math.ceil((reach / (margin - drop)) ** 2))


def smallest_drop(n: int, flip_rate: float, alpha: float, power: float = POWER) -> float:
    """Smallest true loss of accuracy that `n` items show to be a loss with probability `power`; one-sided alpha.

    A loss is never larger than the flip rate: where it would have to be, all flips are losses. 1 where even a loss of
    everything would not do.

    Raises:
        UserError: no items, a flip rate outside 0 .. 1, or an alpha or power outside 0 .. 1.
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    if n < 1 or not 0 <= flip_rate <= 1:
        raise UserError(f"{n} items with a flip rate of {flip_rate:g} tell nothing", "give at least one item")
    by_chance, by_power = _z(alpha, "alpha"), normal_quantile(checked_share(power, "power"))

    def excess(drop: float) -> float:
        flips = max(flip_rate, drop)
        return drop * math.sqrt(n) - by_chance * math.sqrt(flips) - by_power * math.sqrt(flips - drop * drop)

    if excess(1.0) < 0:
        return 1.0
    return float(brentq(excess, 1e-12, 1.0, xtol=1e-12))


def tokens_needed(half_width: float, tokens: int, wanted: float) -> int:
    """Tokens after which the half width of an interval, `half_width` after `tokens`, is `wanted`: it falls with the
    square root of their number.

    Raises:
        UserError: widths that are not finite, or are not above zero.
    """
    if not (math.isfinite(half_width) and half_width >= 0 and math.isfinite(wanted) and wanted > 0 and tokens > 0):
        raise UserError(
            f"no number of tokens takes a half width of {half_width:g} after {tokens} to {wanted:g}",
            "choose a width above zero",
        )
    return max(1, math.ceil(tokens * (half_width / wanted) ** 2))


def _z(alpha: float, what: str) -> float:
    if checked_share(alpha, what) >= 0.5:
        raise UserError(f"a one-sided {what} of {alpha:g} is no test", f"choose an {what} such as 0.05")
    return normal_quantile(1 - alpha)
