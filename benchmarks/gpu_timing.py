"""Time on a GPU: work captured in a CUDA graph, replayed, timed by events. In a dry run work is done once, untimed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPLAYS, WARM = 9, 3
Work = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """Where work runs; `dry`: the device is a CPU, kernels are interpreted, and no time is taken."""

    device: torch.device
    dry: bool

    def seconds(self, work: Work) -> list[float] | None:
        """Of each replay of a CUDA graph of `work`; None in a dry run, which does the work once."""
        if self.dry:
            work()
            return None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        for _ in range(WARM):
            graph.replay()
        found = []
        for _ in range(REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1000)
        return found

    def l2_bytes(self) -> int:
        """Of the device's last cache; in a dry run a few bytes, so that a rotation has more than one turn."""
        return 1024 if self.dry else int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def copy_bandwidth(self) -> float | None:
        """Bytes per second, read and written together, of copying half a gibibyte in device memory."""
        size = 1024 if self.dry else 1 << 29
        source, target = torch.zeros(2, size, dtype=torch.uint8, device=self.device).unbind(0)
        taken = self.seconds(lambda: target.copy_(source))
        return None if taken is None else 2 * size / statistics.median(taken)


def summary(seconds: list[float] | None) -> dict[str, float] | None:
    """Median and spread in microseconds."""
    if seconds is None:
        return None
    return {
        "median_us": 1e6 * statistics.median(seconds),
        "least_us": 1e6 * min(seconds),
        "most_us": 1e6 * max(seconds),
    }


def ratio(slow: list[float] | None, fast: list[float] | None) -> float | None:
    """Of the medians."""
    return None if slow is None or fast is None else statistics.median(slow) / statistics.median(fast)
