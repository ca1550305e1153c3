"""Waivers: a gate that may fail for a while, with a reason and a last day. After that day it fails again."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from pydantic import Field

from compress.evaluation.gating.kinds import Section


class Waiver(Section):
    """`gate` is an id; the waiver holds up to and including the day `until` (UTC)."""

    gate: str
    until: datetime.date
    reason: str = Field(min_length=1)

    def holds(self, today: datetime.date) -> bool:
        """Whether the last day has not passed."""
        return today <= self.until

    def __str__(self) -> str:
        return f"until {self.until.isoformat()}: {self.reason}"


def waiver_of(waivers: Sequence[Waiver], gate: str) -> Waiver | None:
    """The waiver of a gate, None where it has none."""
    return next((waiver for waiver in waivers if waiver.gate == gate), None)
