"""A cost record as rows: what people look at first, then sizes by class and layers by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.commands._output import duration, number, numberless, size

if TYPE_CHECKING:
    from compress.evaluation.costs.record import CostRecord, Measured

NO_VALUE = "-"


def cost_rows(cost: CostRecord) -> list[tuple[str, str]]:
    """(name, value) of every number that is one of the whole model."""
    rows = [
        ("weight files", f"{size(cost.size.file_bytes)}, {number(cost.size.bits_per_weight)} bits per weight"),
        ("load", _seconds(cost.load_seconds)),
        (f"peak memory, {cost.memory_kind or 'not measured'}", size(cost.peak_memory_bytes)),
        ("held once loaded", f"{size(cost.held_memory_bytes)}, and {size(cost.mapped_memory_bytes)} of files mapped"),
        ("first token", _seconds(cost.first_token_seconds)),
        ("prefill, batch 1", _rate(cost.prefill_tokens_per_second)),
        ("decode, batch 1", _rate(cost.decode_tokens_per_second)),
        ("per token p50 / p95 / p99", _latency(cost)),
        *((f"{x.what}, batch {x.batch}", _rate(x.tokens_per_second)) for x in cost.throughput),
        ("weights read per token", size(cost.read_bytes_per_token)),
        ("keys and values read per token", size(cost.cache_read_bytes_per_token)),
        ("share of read bandwidth", _share(cost)),
        ("kernel", cost.kernel + (", DENSE FALLBACK" if cost.dense_fallback else "")),
    ]
    if cost.prices is not None:
        table = cost.prices
        for row in table.tokens:
            rows.append(
                (
                    f"per million tokens, {row.what} {row.batch}",
                    f"{number(row.money_per_million, 3)} {table.currency}, {number(row.kwh_per_million, 3)} kWh",
                )
            )
    return rows


def ratio_of(cost: CostRecord, name: str) -> str:
    """The candidate's speed over the baseline's for the row called `name`; empty where it has none."""
    for ratio in cost.speed_ratios:
        if name == f"{ratio.what}, batch {ratio.batch}":
            return f"{number(ratio.estimate, 3)} [{number(ratio.low, 3)}, {number(ratio.high, 3)}]"
    return ""


def class_rows(cost: CostRecord) -> list[tuple[object, ...]]:
    """(class, tensors, weights, bytes, bytes of scales, bits per weight) and the file's total."""
    total = cost.size
    rows: list[tuple[object, ...]] = [
        (x.name, x.tensors, x.weights, size(x.bytes), size(x.scale_bytes), number(x.bits_per_weight))
        for x in total.classes
    ]
    tensors = sum(x.tensors for x in total.classes)
    headers = f"{size(total.header_bytes)} of headers"
    return [*rows, ("file", tensors, total.weights, size(total.file_bytes), headers, number(total.bits_per_weight))]


def layer_rows(cost: CostRecord) -> list[tuple[object, ...]]:
    """(layers, how many, class, kernel, stored, held, read per token, dense fallback), like layers together."""
    groups: dict[tuple[str, str, str, bool, bool], list[int]] = {}
    for layer in cost.layers:
        key = (numberless(layer.name), layer.tensor_class, layer.kernel, layer.packed, layer.dense_fallback)
        counts = groups.setdefault(key, [0, 0, 0, 0])
        for i, value in enumerate((1, layer.stored_bytes or 0, layer.held_bytes, layer.read_bytes)):
            counts[i] += value
    return [
        (name, count, kind, kernel, size(stored or None), size(held), size(read), "yes" if fallback else "no")
        for (name, kind, kernel, _, fallback), (count, stored, held, read) in groups.items()
    ]


def _seconds(value: Measured | None) -> str:
    if value is None:
        return NO_VALUE
    return f"{_short(value.median)} [{_short(value.low)}, {_short(value.high)}]"


def _rate(value: Measured) -> str:
    return f"{number(value.median)} tokens/s [{number(value.low)}, {number(value.high)}]"


def _latency(cost: CostRecord) -> str:
    latency = cost.token_latency_seconds
    return NO_VALUE if latency is None else " / ".join(_short(x) for x in (latency.p50, latency.p95, latency.p99))


def _share(cost: CostRecord) -> str:
    if cost.read_bandwidth is None or cost.bandwidth_share is None:
        return NO_VALUE
    cached = ", so a cache holds them" if cost.bandwidth_share > 1 else ""
    return f"{number(100 * cost.bandwidth_share, 3)}% of {size(cost.read_bandwidth)}/s{cached}"


def _short(seconds: float) -> str:
    return f"{number(1000 * seconds, 3)} ms" if seconds < 1 else duration(seconds)
