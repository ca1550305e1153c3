"""What a model costs to run beside what it was made from: size, memory and speeds that were measured in turns."""

from __future__ import annotations

from compress.evaluation.costs.record import CostRecord, Measured, Timed
from compress.evaluation.records import EvalRecord
from compress.evaluation.reports.document import Section, Table
from compress.evaluation.reports.values import NONE, interval, size, value


def cost_section(record: EvalRecord | None) -> list[Section]:
    """A row per quantity, with the baseline's and the ratio of both where it was measured too; none without a cost."""
    if record is None or record.cost is None:
        return []
    cost, before = record.cost, record.cost_baseline
    rows: list[tuple[str, ...]] = [
        _sizes("weight files", cost.size.file_bytes, None if before is None else before.size.file_bytes),
        _sizes("memory once loaded", cost.held_memory_bytes, None if before is None else before.held_memory_bytes),
        _sizes("peak memory", cost.peak_memory_bytes, None if before is None else before.peak_memory_bytes),
        _speeds(cost, before, "prefill"),
        _speeds(cost, before, "decode"),
    ]
    work, against = cost.workload, "" if record.baseline is None else f", in turns with {record.baseline.name}"
    lead = [
        f"Speeds of one sequence: {work.prompt_tokens} tokens of prompt, {work.new_tokens} new ones, "
        f"medians of {work.repeats} repeats with their intervals{against}; {work.runtime}, {work.dtype} on "
        f"{work.device}, {work.threads} threads."
    ]
    if cost.dense_fallback:
        lead.append(f"DENSE FALLBACK: {cost.dense_fallback_reason}; speed and memory are a dense model's.")
    columns = ("", ">value", ">baseline", ">value / baseline")
    return [Section("Size, memory and speed", tuple(lead), table=Table(columns, tuple(rows)))]


def _sizes(name: str, found: int | None, before: int | None) -> tuple[str, ...]:
    ratio = NONE if found is None or not before else value(found / before)
    return name, size(found), size(before), ratio


def _speeds(cost: CostRecord, before: CostRecord | None, what: Timed) -> tuple[str, ...]:
    """The ratio is the record's own, of rounds in which both took turns, and not that of the two medians."""
    of_rounds = [each for each in cost.speed_ratios if (each.what, each.batch) == (what, 1)]
    ratio = interval(of_rounds[0].estimate, of_rounds[0].low, of_rounds[0].high) if of_rounds else NONE
    return f"{what}, tokens/s", _rate(cost, what), NONE if before is None else _rate(before, what), ratio


def _rate(cost: CostRecord, what: Timed) -> str:
    found: Measured = cost.prefill_tokens_per_second if what == "prefill" else cost.decode_tokens_per_second
    return interval(found.median, found.low, found.high)
