"""Histograms of weights and scales, a pair per linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from compress.evaluation.reports.plots.style import BLUE, VERMILLION, figure, label, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Histogram(Protocol):
    """Counts between edges, one edge more than counts."""

    @property
    def counts(self) -> Sequence[int]: ...

    @property
    def edges(self) -> Sequence[float]: ...


class Values(Protocol):
    """A linear's name and its two histograms."""

    @property
    def name(self) -> str: ...

    @property
    def weights(self) -> Histogram: ...

    @property
    def scales(self) -> Histogram: ...


def histograms(linears: Sequence[Values]) -> Figure:
    """One row per linear: its weights on the left, counts on a logarithmic axis, and its scales on the right."""
    with look():
        drawing = figure(8.6, 0.7 + 1.55 * len(linears))
        grid = drawing.subplots(len(linears), 2, squeeze=False)
        for (left, right), linear in zip(grid, linears, strict=True):
            _bars(left, linear.weights, BLUE, logarithmic=True)
            _bars(right, linear.scales, VERMILLION, logarithmic=False)
            left.set_title(label(linear.name, 52), fontsize=9)
            left.set_ylabel("weights")
            right.set_ylabel("scales")
        grid[-1][0].set_xlabel("weight (counts on a logarithmic axis)")
        grid[-1][1].set_xlabel("scale")
    return drawing


def _bars(axes: Axes, values: Histogram, colour: str, *, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.stairs(values.counts, values.edges, fill=True, color=colour, baseline=0.5 if logarithmic else 0.0)
    top = max(max(values.counts), 1)
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(0.5, 3.0 * top)
        axes.yaxis.set_major_locator(LogLocator(base=10, numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.1 * top)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: _short(count)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.grid(True, axis="y")


def _short(count: float) -> str:
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:g}{unit}"
    return f"{count:g}"
