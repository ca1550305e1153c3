"""Gates on speed, memory, loading and the dense fallback, on costs that a test chooses."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from compress.errors import IntegrityError
from compress.evaluation.costs.record import (
    ClassSize,
    CostRecord,
    Latency,
    LayerCost,
    Measured,
    SizeRecord,
    SpeedRatio,
    Workload,
)
from compress.evaluation.gating.comparable import compare
from compress.evaluation.gating.comparison import Comparison
from compress.evaluation.gating.decide import decide
from compress.evaluation.gating.judge import judge
from compress.evaluation.gating.kinds import Gate, LoadTime, NoDenseFallback, PeakMemoryRatio
from compress.evaluation.gating.kinds import SpeedRatio as SpeedGate
from compress.evaluation.gating.measure_cost import median_bounds
from compress.evaluation.measures import Skipped, measure
from compress.evaluation.policy import Policy
from tests.evaluation.gate_records import record

RATIOS = [1.1, 1.2, 1.3, 1.25, 1.15, 1.22, 1.18, 1.27, 1.21, 1.19]


def measured(value: float, spread: float = 0.1, level: float = 0.95) -> Measured:
    return Measured(median=value, low=value - spread, high=value + spread, level=level, repeats=7)


def layer(fallback: bool) -> LayerCost:
    return LayerCost(
        name="q",
        tensor_class="attention",
        kernel="k",
        weights=100,
        packed=True,
        stored_bytes=50,
        held_bytes=200 if fallback else 50,
        read_bytes=200 if fallback else 50,
        dense_fallback=fallback,
    )


def cost(**changed: Any) -> CostRecord:
    classes = [ClassSize(name="mlp", tensors=1, weights=100, bytes=50, scale_bytes=0, bits_per_weight=4.0)]
    values: dict[str, Any] = {
        "size": SizeRecord(file_bytes=60, header_bytes=10, weights=100, bits_per_weight=4.8, classes=classes),
        "workload": Workload(
            prompt_tokens=10,
            new_tokens=10,
            batch_sizes=[1],
            repeats=10,
            warm_up=1,
            runtime="native",
            device="cpu",
            dtype="float32",
            threads=1,
            others_busy_cores=0.5,
        ),
        "load_seconds": measured(1.0),
        "memory_kind": "host anonymous",
        "peak_memory_bytes": 500,
        "held_memory_bytes": 400,
        "mapped_memory_bytes": 60,
        "first_token_seconds": measured(1.0),
        "prefill_tokens_per_second": measured(1.0),
        "decode_tokens_per_second": measured(1.0),
        "token_latency_seconds": Latency(p50=1.0, p95=1.0, p99=1.0, steps=10),
        "throughput": [],
        "kernel": "k",
        "layers": [layer(False)],
        "read_bytes_per_token": 50,
        "dense_fallback": False,
        "dense_fallback_reason": None,
        "prices": None,
        "speed_ratios": [
            SpeedRatio(what="decode", batch=1, estimate=1.205, low=1.15, high=1.25, level=0.95, ratios=RATIOS)
        ],
    }
    return CostRecord(**{**values, **changed})


def comparison(**changed: Any) -> Comparison:
    return compare(record(cost=cost(**changed), cost_baseline=cost(peak_memory_bytes=1000, speed_ratios=[])))


def verdict(gate: Gate, **changed: Any) -> str:
    found = measure(gate, comparison(**changed))
    return "SKIPPED" if isinstance(found, Skipped) else judge(gate, found[0], 0.05).verdict


@pytest.mark.parametrize(("minimum", "expected"), [(1.1, "PASS"), (1.2, "INCONCLUSIVE"), (1.3, "FAIL")])
def test_speed(minimum: float, expected: str) -> None:
    assert verdict(SpeedGate(id="g", kind="speed_ratio", min=minimum)) == expected


def test_few_rounds_decide_nothing() -> None:
    few = [SpeedRatio(what="decode", batch=1, estimate=9.0, low=9.0, high=9.0, level=0.9, ratios=[9.0] * 4)]
    assert verdict(SpeedGate(id="g", kind="speed_ratio", min=1.0), speed_ratios=few) == "INCONCLUSIVE"


def test_the_bounds_of_a_median_are_order_statistics_with_their_coverage() -> None:
    low, high = median_bounds(RATIOS)(0.05)
    assert (low, high) == (sorted(RATIOS)[1], sorted(RATIOS)[-2])
    assert stats.binom.cdf(1, 10, 0.5) <= 0.05 < stats.binom.cdf(2, 10, 0.5)
    assert median_bounds([1.0] * 4)(0.05)[0] == -float("inf")
    assert median_bounds([1.0] * 5)(0.05) == (1.0, 1.0)


def test_speed_that_was_not_measured_is_refused() -> None:
    gate = SpeedGate(id="g", kind="speed_ratio", min=1.0, what="prefill")
    with pytest.raises(IntegrityError, match="no speed ratio for prefill"):
        verdict(gate)
    with pytest.raises(IntegrityError, match="no cost of candidate"):
        measure(gate, compare(record()))


@pytest.mark.parametrize(("limit", "expected"), [(0.5, "PASS"), (0.49, "FAIL")])
def test_memory(limit: float, expected: str) -> None:
    gate = PeakMemoryRatio(id="g", kind="peak_memory_ratio", max=limit)
    assert verdict(gate) == expected
    assert verdict(gate, memory_kind=None, peak_memory_bytes=None) == "SKIPPED"
    assert verdict(gate, memory_kind="device") == "SKIPPED"
    busier = cost().workload.model_copy(update={"others_busy_cores": 2.0})
    assert verdict(gate, workload=busier) == expected
    assert verdict(gate, workload=busier.model_copy(update={"prompt_tokens": 20})) == "SKIPPED"


@pytest.mark.parametrize(("limit", "expected"), [(1.2, "PASS"), (1.05, "INCONCLUSIVE"), (0.8, "FAIL")])
def test_loading(limit: float, expected: str) -> None:
    gate = LoadTime(id="g", kind="load_time", max=limit)
    assert verdict(gate) == expected
    assert verdict(gate, load_seconds=None) == "SKIPPED"
    assert verdict(gate, load_seconds=measured(1.0, level=0.5)) == "INCONCLUSIVE"  # too few repeats to be sure


def test_a_dense_fallback_fails() -> None:
    gate = NoDenseFallback(id="g", kind="no_dense_fallback")
    assert verdict(gate) == "PASS"
    fallback: dict[str, Any] = {"dense_fallback": True, "dense_fallback_reason": "q was decoded beforehand"}
    assert verdict(gate, **fallback, layers=[layer(True)]) == "FAIL"
    assert verdict(gate, **fallback) == "FAIL"


def test_another_device_skips_and_never_passes() -> None:
    gate = LoadTime(id="load", kind="load_time", max=10.0, device="cuda")
    assert verdict(gate) == "SKIPPED"
    on_gpu = cost().workload.model_copy(update={"device": "cuda:0"})
    assert verdict(gate, workload=on_gpu) == "PASS"
    rules = {"version": 1, "gate": [{"id": "size", "kind": "size_ratio", "min": 1.0}, gate.model_dump()]}
    found = decide({"baseline": comparison()}, Policy.model_validate(rules))
    assert (found.verdict, found.gates[1].verdict) == ("INCONCLUSIVE", "SKIPPED")
    rules["gate"] = [rules["gate"][0], {**gate.model_dump(), "role": "secondary"}]  # type: ignore[index]
    assert decide({"baseline": comparison()}, Policy.model_validate(rules)).verdict == "PASS"
