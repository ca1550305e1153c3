"""An estimate with its bounds, and the quantiles that bounds are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.errors import UserError

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


def hull(first: Interval, second: Interval) -> Interval:
    """The smallest interval that holds both; the estimate and the level are those of `first`."""
    return Interval(first.estimate, min(first.low, second.low), max(first.high, second.high), first.level)


def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t distribution; the degrees of freedom need not be whole."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(degrees, probability))


def normal_quantile(probability: float) -> float:
    """Quantile of the standard normal distribution."""
    from scipy.special import ndtri

    return float(ndtri(probability))


def two_sided_z(level: float) -> float:
    """Half width, in standard errors, of a two-sided normal interval. Raises UserError unless 0 <= level < 1."""
    if not 0 <= level < 1:
        raise UserError(f"level is {level:g}; it has to lie between 0 and 1", "choose a level such as 0.95")
    return normal_quantile((1 + level) / 2)


def checked_share(value: float, what: str) -> float:
    """`value`, which has to lie strictly between 0 and 1 (so NaN is refused). Raises UserError."""
    if not 0 < value < 1:
        raise UserError(f"{what} is {value:g}; it has to lie between 0 and 1", "choose one such as 0.05")
    return value
