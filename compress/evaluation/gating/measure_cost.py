"""What gates on size, speed, memory and loading measure.

Sizes are exact. Speeds are medians over rounds in which the two models took turns, bounded by order statistics, which
hold for any distribution (Conover, Practical Nonparametric Statistics, 3.2); too few rounds give no bound, and then
nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.evaluation.gating.comparison import Comparison
from compress.evaluation.gating.kinds import (
    BitsPerWeightMax,
    BytesMax,
    DeviceGate,
    Gate,
    LoadTime,
    NoDenseFallback,
    PeakMemoryRatio,
    SizeGate,
    SizeRatio,
    SpeedRatio,
)
from compress.evaluation.measures import Bounds, Measure, Skipped, exactly
from compress.evaluation.records import CostRecord


def size(gate: SizeGate, comparison: Comparison) -> Measure:
    """Bytes and bits, known exactly."""
    ours, theirs = comparison.candidate, comparison.baseline
    if isinstance(gate, SizeRatio):
        ratio = theirs.size()[0] / ours.size()[0]
        return Measure(ratio, exactly(ratio), gate.min, False, "ratio", exact=True)
    if isinstance(gate, BytesMax):
        taken = float(ours.size()[0])
        return Measure(taken, exactly(taken), gate.max, True, "bytes", exact=True)
    assert isinstance(gate, BitsPerWeightMax)
    bits = ours.size()[1]
    return Measure(bits, exactly(bits), gate.max, True, "bits", exact=True)


def measure(gate: Gate, comparison: Comparison) -> list[Measure] | Skipped:
    """Speed, memory and loading, on the device that the gate is for."""
    assert isinstance(gate, DeviceGate)
    cost = comparison.cost()
    device = cost.workload.device
    if gate.device is not None and device.split(":")[0] != gate.device:
        return Skipped(f"measured on {device}; the gate is for {gate.device}")
    if isinstance(gate, SpeedRatio):
        return _speed(gate, comparison, cost)
    if isinstance(gate, PeakMemoryRatio):
        return _memory(gate, comparison, cost)
    if isinstance(gate, LoadTime):
        return _loading(gate, cost)
    assert isinstance(gate, NoDenseFallback)
    decoded = max(sum(layer.dense_fallback for layer in cost.layers), int(cost.dense_fallback))
    note = cost.dense_fallback_reason or ""
    return [Measure(decoded, exactly(decoded), 0, True, "linears", exact=True, note=note)]


def _speed(gate: SpeedRatio, comparison: Comparison, cost: CostRecord) -> list[Measure]:
    comparison.needed(cost if comparison.alone is None else None, f"gate {gate.id} (speed_ratio)")
    ratio = cost.speed_ratio(gate.what, gate.batch)
    bounds = median_bounds(ratio.ratios)
    rounds = len(ratio.ratios)
    return [Measure(ratio.estimate, bounds, gate.min, False, "ratio", subject=gate.what, size=rounds, counted="rounds")]


def _memory(gate: PeakMemoryRatio, comparison: Comparison, cost: CostRecord) -> list[Measure] | Skipped:
    baseline = comparison.cost_baseline()
    if cost.peak_memory_bytes is None or not baseline.peak_memory_bytes:
        return Skipped("this system does not tell the peak of memory")
    if cost.memory_kind != baseline.memory_kind or cost.workload != baseline.workload.model_copy(
        update={"others_busy_cores": cost.workload.others_busy_cores}
    ):
        return Skipped("the two peaks of memory were not measured under the same work")
    ratio = cost.peak_memory_bytes / baseline.peak_memory_bytes
    return [Measure(ratio, exactly(ratio), gate.max, True, "ratio", exact=True)]


def _loading(gate: LoadTime, cost: CostRecord) -> list[Measure] | Skipped:
    seconds = cost.load_seconds
    if seconds is None:
        return Skipped("the time to load was not measured")

    def bounds(alpha: float) -> tuple[float, float]:
        known = seconds.level >= 1 - 2 * alpha
        return (seconds.low, seconds.high) if known else (0.0, math.inf)

    return [Measure(seconds.median, bounds, gate.max, True, "seconds", size=seconds.repeats, counted="rounds")]


def median_bounds(values: Sequence[float]) -> Bounds:
    """Bounds of the median of independent values: the k-th smallest, k the largest with P(B(n, 1/2) < k) <= alpha."""
    ordered = sorted(values)

    def bounds(alpha: float) -> tuple[float, float]:
        from scipy.special import bdtr  # type: ignore[import-untyped]

        n = len(ordered)
        below = 0
        while below < n / 2 and float(bdtr(below, n, 0.5)) <= alpha:
            below += 1
        return (ordered[below - 1], ordered[n - below]) if below else (-math.inf, math.inf)

    return bounds
