"""Gate values over time: one small panel per gate, with intervals, limits, releases and what drifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.evaluation.reports.plots.style import (
    BLACK,
    MARKERS,
    SERIES,
    VERMILLION,
    figure,
    label,
    look,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICKS = 12


@dataclass(frozen=True, slots=True)
class TrendPoint:
    """One run: its place in the history from 0, the value with its bounds, and the series that it belongs to.

    Points of one series were made in one environment, on one text, against comparable baselines: only they are joined.
    """

    place: int
    estimate: float
    low: float | None
    high: float | None
    series: str
    release: bool


@dataclass(frozen=True, slots=True)
class TrendPanel:
    """One gate. `limits`: (place, limit) of each run; `worse`: +1 where larger is worse; `flag`: what drifted."""

    title: str
    unit: str
    points: tuple[TrendPoint, ...]
    limits: tuple[tuple[int, float], ...]
    worse: int
    flag: str | None = None


def trend(panels: Sequence[TrendPanel], runs: Sequence[str], title: str = "") -> Figure:
    """Panels below each other over the common axis of `runs`, the names of all runs in order."""
    with look():
        drawing = figure(9.0, 1.3 + 1.55 * len(panels))
        rows = drawing.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        names = list(dict.fromkeys(point.series for panel in panels for point in panel.points))
        for axes, panel in zip(rows, panels, strict=True):
            _panel(axes, panel, names)
        last = rows[-1]
        places = _places(len(runs), {point.place for panel in panels for point in panel.points if point.release})
        last.set_xticks(places, [label(runs[k], 18) for k in places], rotation=30, ha="right", rotation_mode="anchor")
        last.set_xlim(-0.5, len(runs) - 0.5)
        _legend(drawing, panels, names)
        if title:
            drawing.suptitle(label(title, 100), x=0.01, ha="left", fontsize=11)
    return drawing


def _panel(axes: Axes, panel: TrendPanel, names: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name in names:
        points = [point for point in panel.points if point.series == name]
        if not points:
            continue
        k = names.index(name)
        colour, marker = SERIES[k % len(SERIES)], MARKERS[k % len(MARKERS)]
        for point in points:
            low = point.estimate if point.low is None else point.low
            high = point.estimate if point.high is None else point.high
            axes.plot([point.place] * 2, [low, high], color=colour, linewidth=1.2, alpha=0.75)
        axes.plot(
            [p.place for p in points], [p.estimate for p in points], color=colour, marker=marker, markersize=5,
            linewidth=1.4,
        )  # fmt: skip
        released = [p for p in points if p.release]
        axes.plot(
            [p.place for p in released], [p.estimate for p in released], linestyle="none", marker="o", markersize=12,
            mfc="none", mec=BLACK, mew=1.2,
        )  # fmt: skip
    if panel.limits:
        places, limits = zip(*panel.limits, strict=True)
        axes.step(places, limits, where="mid", color=BLACK, linestyle="--", linewidth=1.0)
        if len(places) == 1:
            axes.axhline(limits[0], color=BLACK, linestyle="--", linewidth=1.0)
    direction = "lower is better" if panel.worse > 0 else "higher is better"
    unit = f"{panel.unit}, " if panel.unit else ""
    axes.set_title(label(f"{panel.title}  ({unit}{direction})", 70), color=VERMILLION if panel.flag else BLACK)
    if panel.flag:
        axes.set_title(label(panel.flag, 70), loc="right", color=VERMILLION, fontsize=8.5, fontweight="bold")
    axes.margins(y=0.15)
    axes.grid(True, axis="y")
    axes.tick_params(axis="x", length=3)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))


def _places(runs: int, releases: set[int]) -> list[int]:
    """The runs that are named: the newest, the releases, and others between them, none too near another."""
    step = max(1, -(-runs // _TICKS))
    chosen: list[int] = []
    for place in (runs - 1, *sorted(releases, reverse=True), *range(runs - 1, -1, -step)):
        if all(abs(place - other) >= step for other in chosen):
            chosen.append(place)
    return sorted(chosen)


def _legend(drawing: Figure, panels: Sequence[TrendPanel], names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=SERIES[k % len(SERIES)], marker=MARKERS[k % len(MARKERS)], markersize=5, label=label(name))
        for k, name in enumerate(names)
    ]
    if any(panel.limits for panel in panels):
        handles.append(Line2D([], [], color=BLACK, linestyle="--", linewidth=1.0, label="limit"))
    if any(point.release for panel in panels for point in panel.points):
        ring = Line2D([], [], linestyle="none", marker="o", markersize=11, mfc="none", mec=BLACK, label="release")
        handles.append(ring)
    drawing.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8)
