"""The quality table: one row per model, scheme, method and tool, seeds averaged per block, comparisons paired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.intervals import Array, Estimate, mean_per_token, outlier_recovery, ratio, recovery
from benchmarks.scoring import BlockSums
from benchmarks.workspace import Run

Row = dict[str, Any]
Key = tuple[str, int, int | str, str, str]
"""Model, bits, group, variant, tool."""


@dataclass(frozen=True)
class Measured:
    """The scores of one artifact and the bits it stores per quantised weight."""

    sums: BlockSums
    bits_per_weight: float


def rows(measured: Mapping[Run, Measured]) -> list[Row]:
    """Table rows as plain data. The reference of each comparison is absent where it was not measured."""
    groups: dict[Key, list[Measured]] = {}
    for run, result in measured.items():
        groups.setdefault((run.model, run.bits, run.group, run.variant, run.tool), []).append(result)

    def kl(model: str, bits: int, group: int | str, variant: str, tool: str) -> Array | None:
        found = groups.get((model, bits, group, variant, tool))
        return None if found is None else np.mean([m.sums.kl for m in found], axis=0)

    def rtn_kl(model: str, bits: int, group: int | str) -> Array | None:
        peer = kl(model, bits, group, "rtn", "peer")
        return kl(model, bits, group, "rtn", "ours") if peer is None else peer

    table: list[Row] = []
    for (model, bits, group, variant, tool), results in groups.items():
        mine = kl(model, bits, group, variant, tool)
        assert mine is not None
        rtn = rtn_kl(model, bits, group)
        peer = kl(model, bits, group, variant, "peer") if tool == "ours" else None
        plain = rtn_kl(model.removesuffix("-twin"), bits, group) if model.endswith("-twin") else None
        seeds = [r.sums.mean_kl for r in results]
        row: Row = {
            "model": model,
            "bits": bits,
            "group": group,
            "method": variant,
            "tool": "compress" if tool == "ours" else "llm-compressor",
            "bits_per_weight": results[0].bits_per_weight,
            "perplexity": float(np.mean([r.sums.perplexity for r in results])),
            "top1": float(np.mean([r.sums.agreement for r in results])),
            "kl": _plain(mean_per_token(mine, results[0].sums.tokens)),
            "kl_per_seed": seeds,
        }
        if rtn is not None and variant != "rtn":
            row["recovery"] = _plain(recovery(mine, rtn))
        if peer is not None:
            row["ratio_to_peer"] = _plain(ratio(mine, peer))
        if rtn is not None and plain is not None and variant != "rtn":
            row["outlier_recovery"] = _plain(outlier_recovery(mine, rtn, plain))
        table.append(row)
    return _ordered(table)


def merged(earlier: list[Row], table: list[Row]) -> list[Row]:
    """The rows of an earlier record that were not measured again, and those that were."""
    again = {_identity(row) for row in table}
    return _ordered([*(row for row in earlier if _identity(row) not in again), *table])


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "bits", "group", "method", "tool"))


def _ordered(table: list[Row]) -> list[Row]:
    return sorted(table, key=lambda r: (r["model"], -r["bits"], r["method"] != "rtn", r["method"], r["tool"]))


def render(table: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | scheme | method | tool | stored bits/weight | perplexity | KL to base | top-1 | 1 - KL/KL_RTN "
        "| KL ours / peer | won back of the twin's RTN loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        granularity = "channel" if row["group"] == "channel" else f"g{row['group']}"
        cells = (
            row["model"],
            f"W{row['bits']} {granularity}",
            row["method"],
            row["tool"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['perplexity']:.3f}",
            _text(row["kl"], 5),
            f"{row['top1']:.2%}",
            *(_text(row.get(name), 3) for name in ("recovery", "ratio_to_peer", "outlier_recovery")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(value: Estimate) -> dict[str, float]:
    return asdict(value)


def _text(value: dict[str, float] | None, digits: int) -> str:
    return "" if value is None else Estimate(**value).text(digits)
