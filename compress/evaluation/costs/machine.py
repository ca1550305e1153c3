"""How busy others kept the machine while something was measured. Free of torch."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")

DISTURBED_CORES = 0.25
"""Cores busy with other processes from which timings are not to be trusted."""


@dataclass(frozen=True, slots=True)
class Busy:
    """CPU seconds of all processes and of this one and its children, at one moment."""

    all_seconds: float
    own_seconds: float
    at: float

    @classmethod
    def now(cls) -> Busy | None:
        """None where the system does not say."""
        try:
            fields = _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _idle, _wait, irq, softirq = (int(field) for field in fields[:7])
        ticks: int = os.sysconf("SC_CLK_TCK")
        own = os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        return cls((user + nice + system + irq + softirq) / ticks, mine, time.monotonic())

    def others_since(self, earlier: Busy) -> float:
        """Cores that other processes kept busy since `earlier`, on average."""
        seconds = max(self.at - earlier.at, 1e-9)
        others = (self.all_seconds - earlier.all_seconds) - (self.own_seconds - earlier.own_seconds)
        return max(0.0, others / seconds)
