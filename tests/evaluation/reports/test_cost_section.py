"""Size and speed in a report: the record's numbers, its own ratio of rounds, and nothing where nothing was measured."""

from __future__ import annotations

from compress.evaluation.costs.record import Measured, SpeedRatio
from compress.evaluation.reports.cost_section import cost_section
from tests.evaluation.gate_records import record
from tests.evaluation.test_gate_cost import cost


def rate(median: float) -> Measured:
    return Measured(median=median, low=median - 1, high=median + 1, level=0.95, repeats=10)


def ratio(what: str, batch: int, estimate: float) -> SpeedRatio:
    values = {"what": what, "batch": batch, "estimate": estimate, "low": estimate - 0.1, "high": estimate + 0.1}
    return SpeedRatio.model_validate({**values, "level": 0.95, "ratios": [estimate] * 10})


def test_both_models_and_the_ratio_of_rounds_are_shown() -> None:
    ratios = [ratio("batched decode", 4, 9.0), ratio("prefill", 1, 1.5), ratio("decode", 4, 8.0)]
    mine = cost(prefill_tokens_per_second=rate(300), decode_tokens_per_second=rate(60), speed_ratios=ratios)
    theirs = cost(prefill_tokens_per_second=rate(100), decode_tokens_per_second=rate(50), held_memory_bytes=None)
    (section,) = cost_section(record(cost=mine, cost_baseline=theirs))
    assert section.table is not None
    rows = {name: tuple(rest) for name, *rest in section.table.rows}
    assert rows["weight files"] == ("60 B", "60 B", "1")
    assert rows["memory once loaded"][1:] == ("-", "-")
    assert rows["prefill, tokens/s"] == ("300 [299, 301]", "100 [99, 101]", "1.5 [1.4, 1.6]")
    assert rows["decode, tokens/s"] == ("60 [59, 61]", "50 [49, 51]", "-"), "8 is of batches of four"
    assert "in turns with" in section.text[0]


def test_what_was_not_measured_is_not_shown() -> None:
    assert cost_section(None) == cost_section(record()) == []
    mine = cost(dense_fallback=True, dense_fallback_reason="decoded", speed_ratios=[])
    (alone,) = cost_section(record(baseline=None, texts=[], cost=mine))
    assert alone.table is not None
    assert all(row[2:] == ("-", "-") for row in alone.table.rows)
    assert "in turns" not in alone.text[0]
    assert "DENSE FALLBACK: decoded" in alone.text[1]
