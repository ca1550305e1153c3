"""The table and the picture of the size-quality front, from measured points."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.intervals import Estimate, mean_per_token, ratio
from benchmarks.points import OURS, Measured

Row = dict[str, Any]


def best_within(points: list[Measured], bits: float, linears: bool = False) -> Measured | None:
    """Of our points the one of least KL with at most `bits` over the file, or over the linears, if any has so few."""
    own = [point for point in points if point.tool == OURS]
    fitting = [point for point in own if (point.linear_bits if linears else point.file_bits) <= bits]
    return min(fitting, key=lambda point: point.sums.mean_kl, default=None)


def _compared(point: Measured, best: Measured | None) -> Row:
    if best is None:
        return {"ours": None, "ratio": None, "held": False}
    held = best.sums.mean_kl <= point.sums.mean_kl
    return {"ours": best.name, "ratio": asdict(ratio(best.sums.kl, point.sums.kl)), "held": held}


def rows(points: list[Measured]) -> list[Row]:
    """One row per point by falling size; another tool's names the best of ours within its bits, and both KLs' ratio.

    `file` counts bits over all parameters of the weight files, `linears` over those of the decoder blocks' linears.
    """
    table = []
    for point in sorted(points, key=lambda p: -p.file_bits):
        row: Row = {
            "tool": point.tool,
            "name": point.name,
            "bits_of_file": point.file_bits,
            "bits_of_linears": point.linear_bits,
            "kl": asdict(mean_per_token(point.sums.kl, point.sums.tokens)),
            "kl_by_seed": point.seeds,
            "perplexity": point.sums.perplexity,
            "top1": point.sums.agreement,
        }
        if point.tool != OURS:
            row["file"] = _compared(point, best_within(points, point.file_bits))
            row["linears"] = _compared(point, best_within(points, point.linear_bits, linears=True))
        table.append(row)
    return table


def render(table: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| tool | point | bits, file | bits, linears | KL to base | top-1 "
        "| ours within the file's bits: its KL over this | within the linears' bits |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in table:
        kl = Estimate(**row["kl"]).text(4)
        name = f"**{row['name']}**" if row["tool"] == OURS else row["name"]
        cells = [_cell(row[kind]) if kind in row else "" for kind in ("file", "linears")]
        lines.append(
            f"| {row['tool']} | {name} | {row['bits_of_file']:.3f} | {row['bits_of_linears']:.3f} | {kl} | "
            f"{row['top1']:.1%} | {cells[0]} | {cells[1]} |"
        )
    return "\n".join(lines)


def _cell(compared: Row) -> str:
    if compared["ours"] is None:
        return "**missed**: none so small"
    cell = f"{compared['ours']}: {Estimate(**compared['ratio']).text()}"
    return cell if compared["held"] else f"**missed** {cell}"


def plot(model: str, points: list[Measured], path: Path) -> None:
    """Writes the picture: KL over bits of the file, ours joined where no smaller one of ours is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for tool in dict.fromkeys(point.tool for point in points):
        own = [point for point in points if point.tool == tool]
        shown = {"marker": "o", "s": 46, "zorder": 3} if tool == OURS else {"marker": "x", "s": 40}
        axes.scatter([p.file_bits for p in own], [p.sums.mean_kl for p in own], label=tool, **shown)
        for point in own:
            axes.annotate(
                point.name, (point.file_bits, point.sums.mean_kl), xytext=(4, 4), textcoords="offset points", fontsize=7
            )
    front = sorted((p.file_bits, p.sums.mean_kl) for p in points if best_within(points, p.file_bits) is p)
    axes.plot([bits for bits, _ in front], [kl for _, kl in front], linewidth=1)
    axes.set(xlabel="bits per parameter, whole file", ylabel="KL to the base, nats per token", title=model)
    axes.set_yscale("log")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
