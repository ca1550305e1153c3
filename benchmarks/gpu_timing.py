"""Time on a GPU: works take turns, each replayed as a CUDA graph so often between two events that launches vanish."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS, WARM = 9, 3
LEAST_SECONDS = 0.01
"""Of work between two events: a launch, about 10 microseconds before the first replay begins, is 0.1 percent of it."""
Work = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """Where work runs; `dry`: the device is a CPU, kernels are interpreted, and no time is taken."""

    device: torch.device
    dry: bool

    def turns(self, works: Mapping[str, Work], capture: bool = True) -> dict[str, list[float]]:
        """Seconds of each work in each of the rounds, in which they take turns; none in a dry run, which works once.

        capture: each is recorded as a CUDA graph, all before the first round; else they are called, one after the other
        without waiting, and have to take the device longer than they take the CPU.
        """
        if self.dry:
            for work in works.values():
                work()
            return {name: [] for name in works}
        replays = {name: self._captured(work) if capture else work for name, work in works.items()}
        times = {}
        for name, replay in replays.items():
            for _ in range(WARM):
                replay()
            times[name] = max(1, round(LEAST_SECONDS / self._seconds(replay, 1)))
        found: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(ROUNDS):
            for name, replay in replays.items():
                found[name].append(self._seconds(replay, times[name]))
        return found

    def _captured(self, work: Work) -> Work:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = work()
        return lambda: (graph.replay(), kept)

    def _seconds(self, replay: Work, times: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / times

    def l2_bytes(self) -> int:
        """Of the device's last cache; in a dry run a few bytes, so that a rotation has more than one turn."""
        return 1024 if self.dry else int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def copy(self) -> tuple[Work, int]:
        """A copy in device memory of half a gibibyte, and the bytes that it reads and writes."""
        size = 1024 if self.dry else 1 << 29
        source, target = torch.zeros(2, size, dtype=torch.uint8, device=self.device).unbind(0)
        return (lambda: target.copy_(source)), 2 * size


def summary(seconds: list[float]) -> dict[str, float] | None:
    """Median and spread in microseconds; None of nothing."""
    if not seconds:
        return None
    return {
        "median_us": 1e6 * statistics.median(seconds),
        "least_us": 1e6 * min(seconds),
        "most_us": 1e6 * max(seconds),
    }


def spread(figures: list[float]) -> dict[str, float] | None:
    """Median, least and most of one figure per round; None of nothing."""
    if not figures:
        return None
    return {"median": statistics.median(figures), "least": min(figures), "most": max(figures)}


def ratios(slow: list[float], fast: list[float]) -> dict[str, float] | None:
    """How many times faster, round by round, as `spread`."""
    return spread([one / other for one, other in zip(slow, fast, strict=True)])
