"""Tokens per second by batch size, of one model or of two that were timed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.evaluation.reports.plots.style import MARKERS, SERIES, figure, label, look, plain_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from compress.evaluation.costs.record import CostRecord, Measured


@dataclass(frozen=True, slots=True)
class SpeedCurve:
    """One model in one kind of work: (batch size, median, low, high) in tokens per second, batch sizes rising."""

    label: str
    points: tuple[tuple[int, float, float, float], ...]

    @classmethod
    def decoding(cls, name: str, cost: CostRecord) -> SpeedCurve:
        """New tokens of all rows together; of one answer alone where the runtime does not decode rows together."""
        rates = {x.batch: x.tokens_per_second for x in cost.throughput if x.what == "batched decode"}
        return cls(name, _points(rates or {1: cost.decode_tokens_per_second}))

    @classmethod
    def reading(cls, name: str, cost: CostRecord) -> SpeedCurve:
        """Prompt tokens of all rows together."""
        return cls(
            name, _points({x.batch: x.tokens_per_second for x in cost.throughput if x.what == "batched forward"})
        )


def speeds(decoding: Sequence[SpeedCurve], reading: Sequence[SpeedCurve], title: str = "") -> Figure:
    """Decoding on the left, prompts on the right, both axes logarithmic; bars are the medians' intervals."""
    with look():
        drawing = figure(8.6, 4.0)
        left, right = drawing.subplots(1, 2)
        _panel(left, decoding, "decoding", "new tokens/s, all rows together")
        _panel(right, reading, "prompts", "prompt tokens/s, all rows together")
        handles, names = left.get_legend_handles_labels()
        drawing.legend(handles, names, loc="outside lower center", ncols=len(names))
        if title:
            drawing.suptitle(label(title, 100), x=0.01, ha="left", fontsize=11)
    return drawing


def _points(rates: dict[int, Measured]) -> tuple[tuple[int, float, float, float], ...]:
    return tuple((batch, rates[batch].median, rates[batch].low, rates[batch].high) for batch in sorted(rates))


def _panel(axes: Axes, curves: Sequence[SpeedCurve], title: str, unit: str) -> None:
    from matplotlib.ticker import NullLocator

    for k, curve in enumerate(curves):
        batches, medians, lows, highs = zip(*curve.points, strict=True)
        below = [median - low for median, low in zip(medians, lows, strict=True)]
        above = [high - median for median, high in zip(medians, highs, strict=True)]
        axes.errorbar(
            batches, medians, yerr=[below, above], label=label(curve.label, 44), color=SERIES[k % len(SERIES)],
            marker=MARKERS[k % len(MARKERS)], markersize=6, linewidth=1.8, elinewidth=1.0, capsize=2.5,
        )  # fmt: skip
    values = [value for curve in curves for _, *rates in curve.points for value in rates]
    sizes = sorted({batch for curve in curves for batch, *_ in curve.points})
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
    plain_log(axes.yaxis, 2.25 * max(values) / min(values))
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.set_xticks(sizes, [str(batch) for batch in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True)
    axes.set_title(title)
    axes.set_xlabel("batch size")
    axes.set_ylabel(unit)
