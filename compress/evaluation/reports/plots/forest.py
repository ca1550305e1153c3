"""Every gate in one picture: the estimate with its bounds, as a share of the loss that the limit allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.evaluation.reports.plots.style import BLACK, GREY, VERDICTS, figure, label, look
from compress.evaluation.reports.scale import loss_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEFT, _RIGHT = -0.5, 2.5
_MARGIN = 0.08
_LETTER, _LETTERS = 0.075, 30
_PICTURE, _VERDICTS, _NUMBERS = 3.6, 2.1, 4.0
_TOP, _ROW, _BOTTOM = 0.55, 0.32, 0.55
"""Inches."""


@dataclass(frozen=True, slots=True)
class ForestRow:
    """One gate. `low` and `high` are its bounds, None where there is none; `text` is written beside the picture."""

    label: str
    kind: str
    estimate: float | None
    low: float | None
    high: float | None
    limit: float
    rule: str
    verdict: str
    text: str
    secondary: bool = False


def forest(rows: Sequence[ForestRow], title: str = "") -> Figure:
    """One line per gate from the top down; left of the limit is good. What lies beyond the frame is an arrow there."""
    with look():
        labels = [label(row.label, _LETTERS) for row in rows]
        names = 0.3 + _LETTER * max(map(len, labels), default=0)
        width, height = names + _PICTURE + _VERDICTS + _NUMBERS, _TOP + _BOTTOM + _ROW * len(rows)
        drawing = figure(width, height)
        drawing.set_layout_engine("none")  # columns of fixed width: names, picture, verdicts, numbers
        axes = drawing.add_axes(
            (names / width, _BOTTOM / height, _PICTURE / width, max(_ROW * len(rows), 0.01) / height)
        )
        spans = [_span(row) for row in rows]
        left, right = _frame(spans)
        axes.axvspan(left, 1.0, color="#EEF3F7", zorder=0)
        axes.axvline(0.0, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
        axes.axvline(1.0, color=BLACK, linewidth=1.2, zorder=1)
        axes.text(1.0, 1.0, "limit", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
        for place, (row, span) in enumerate(zip(rows, spans, strict=True)):
            _draw(axes, place, row, span, left, right)
            _write(axes, place, row)
        axes.set_xlim(left, right)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), labels)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        places = [k / 2 for k in range(math.ceil(left * 2), math.floor(right * 2) + 1)]
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_xlabel("loss as a share of what the limit allows")
        if title:
            drawing.text(0.012, 1 - 0.1 / height, label(title, 110), ha="left", va="top", fontsize=10)
    return drawing


def _span(row: ForestRow) -> tuple[float | None, float, float]:
    """(estimate, least loss, largest loss) as shares; a bound that is not known is infinite."""
    shares = [loss_share(value, row.limit, row.rule, row.kind) for value in (row.estimate, row.low, row.high)]
    best, worst = (shares[1], shares[2]) if row.rule == "at most" else (shares[2], shares[1])
    return shares[0], -math.inf if best is None else best, math.inf if worst is None else worst


def _frame(spans: Sequence[tuple[float | None, float, float]]) -> tuple[float, float]:
    """From a little left of no loss to a little right of the limit, and as far out as is still readable."""
    ends = [end for estimate, low, high in spans if estimate is not None for end in (estimate, low, high)]
    finite = [end for end in ends if math.isfinite(end)]
    left = max(_LEFT, min([-0.1, *(end - _MARGIN for end in finite)]))
    right = min(_RIGHT, max([1.25, *(end + _MARGIN for end in finite)]))
    return left, right


def _draw(
    axes: Axes, place: int, row: ForestRow, span: tuple[float | None, float, float], left: float, right: float
) -> None:
    colour, marker = _style(row)
    estimate, low, high = span
    if estimate is None:
        return
    low, high = min(low, estimate), max(high, estimate)
    if low <= right and high >= left:
        axes.plot([max(low, left), min(high, right)], [place, place], color=colour, linewidth=2.0, zorder=3)
    if left <= estimate <= right:
        axes.plot([estimate], [place], marker=marker, color=colour, markersize=8, zorder=5, mec="white", mew=0.8)
    for beyond, edge, arrow in ((low < left, left, 8), (high > right, right, 9)):  # 8, 9: carets that point out
        if beyond:
            axes.plot([edge], [place], marker=arrow, color=colour, markersize=8, clip_on=False, zorder=4)


def _write(axes: Axes, place: int, row: ForestRow) -> None:
    """The verdict with its mark, and the numbers, in columns to the right."""
    colour, marker = _style(row)
    across = axes.get_yaxis_transform()
    start = 1 + 0.3 / _PICTURE
    axes.plot([start], [place], marker=marker, color=colour, markersize=7, transform=across, clip_on=False)
    verdict = row.verdict + (", secondary" if row.secondary else "")
    axes.text(start + 0.11 / _PICTURE, place, verdict, transform=across, va="center", fontsize=8.5)
    axes.text(start + _VERDICTS / _PICTURE, place, label(row.text, 52), transform=across, va="center", fontsize=8.5)


def _style(row: ForestRow) -> tuple[str, str]:
    return VERDICTS.get(row.verdict, (GREY, "s"))
