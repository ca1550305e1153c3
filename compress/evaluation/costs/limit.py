"""Seconds that the parts of a measurement share, each up to a share of them. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Callable

Clock = Callable[[], float]


class Limit:
    """`seconds` from now on for all parts; None: as long as it takes."""

    def __init__(self, seconds: float | None, clock: Clock) -> None:
        self._clock, self._began = clock, clock()
        self._seconds = math.inf if seconds is None else seconds

    def spent(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._began

    def left(self, share: float = 1.0) -> float:
        """Seconds until `share` of all is spent; below zero behind it, infinite without a limit."""
        return share * self._seconds - self.spent()

    def part(self, share: float) -> Part:
        """A part that is to be over when `share` of all seconds is spent."""
        return Part(self, share)


class Part:
    """Equal runs, before each of which `over` is asked."""

    def __init__(self, limit: Limit, share: float) -> None:
        self._limit, self._share = limit, share
        self._asked: float | None = None
        self._longest = 0.0

    def over(self) -> bool:
        """Whether one more run, as long as the longest so far, would not fit."""
        now = self._limit.spent()
        if self._asked is not None:
            self._longest = max(self._longest, now - self._asked)
        self._asked = now
        return self._longest >= self._limit.left(self._share)
