"""Size against quality: which artifacts are the best for their size, and which another one beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from compress.evaluation.reports.plots.style import BLACK, BLUE, GREY, figure, label, log_range, look, plain_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_Place = tuple[tuple[int, int], Literal["left", "right", "center"], Literal["bottom", "top"]]
_ACROSS: dict[int, Literal["left", "right", "center"]] = {1: "left", -1: "right", 0: "center"}
_PLACES: tuple[_Place, ...] = tuple(
    ((across * (8 + rise // 4), up * rise), _ACROSS[across], "bottom" if up > 0 else "top")
    for rise in (6, 22, 38, 54, 72, 90)
    for across in (1, -1, 0)
    for up in (1, -1)
    if across or rise > 10
)
"""Where a name may stand beside its mark: offset in points, and the alignments that go with it; the best first."""


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One artifact: size of its weight files in MB, its loss with an interval, and whether no other beats it."""

    label: str
    megabytes: float
    loss: float
    low: float
    high: float
    best: bool


def best_for_size(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (size, loss): whether no other is at most as large with at most the loss, and better in one of them."""
    return [not any(s <= size and x <= loss and (s, x) != (size, loss) for s, x in points) for size, loss in points]


def front(points: Sequence[FrontPoint], loss: str, title: str = "", baseline_megabytes: float | None = None) -> Figure:
    """Size to the right, `loss` (its name and unit) upwards: the lower left is best. Those that none beats are joined.

    A dashed line stands at the size of the baseline where it is given.
    """
    with look():
        drawing = figure(8.0, 4.8)
        axes = drawing.add_subplot()
        joined = sorted((p for p in points if p.best), key=lambda p: (p.megabytes, -p.loss))
        if len(joined) > 1:
            axes.step([p.megabytes for p in joined], [p.loss for p in joined], where="post", color=BLUE, linewidth=1.4)
        floor = min((p.loss for p in points if p.loss > 0.0), default=1.0) / 10
        logarithmic = bool(points) and all(p.loss > 0.0 for p in points)
        for point in points:
            low = max(point.low, floor) if logarithmic else point.low
            colour = BLUE if point.best else GREY
            axes.plot([point.megabytes] * 2, [min(low, point.loss), point.high], color=colour, linewidth=1.6, zorder=2)
            axes.plot(
                [point.megabytes], [point.loss], marker="o" if point.best else "s", color=colour, markersize=8,
                mfc=colour if point.best else "white", mew=1.6, zorder=3,
            )  # fmt: skip
        _axes(axes, points, loss, logarithmic, floor, baseline_megabytes)
        if title:
            axes.set_title(label(title, 84))
        drawing.draw_without_rendering()
        drawing.set_layout_engine("none")  # names are placed on the final scale
        _name(axes, points, joined)
    return drawing


def _axes(
    axes: Axes, points: Sequence[FrontPoint], loss: str, logarithmic: bool, floor: float, baseline: float | None
) -> None:
    """Scales, names and the legend."""
    from matplotlib.lines import Line2D

    if logarithmic:
        log_range(axes, min(max(p.low, floor) for p in points), max(p.high for p in points))
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.3, high * 1.3)
    else:
        axes.margins(y=0.18)
    sizes = [p.megabytes for p in points] + ([baseline] if baseline is not None else [])
    least, most = min(sizes, default=1.0), max(sizes, default=1.0)
    if most > 8 * least:
        axes.set_xscale("log")
        axes.set_xlim(least / 1.4, most * 1.8)
        plain_log(axes.xaxis, most / least)
    else:
        room = 0.2 * (most - least) or 0.3 * most
        axes.set_xlim(max(0.0, least - room), most + room)
    handles = [
        Line2D([], [], color=BLUE, marker="o", linewidth=1.4, markersize=7, label="best for its size"),
        Line2D(
            [],
            [],
            color=GREY,
            marker="s",
            mfc="white",
            mew=1.6,
            linewidth=0,
            markersize=7,
            label="another is no larger and no worse",
        ),
    ]
    if baseline is not None:
        axes.axvline(baseline, color=BLACK, linewidth=1.0, linestyle="--", zorder=1)
        handles.append(Line2D([], [], color=BLACK, linestyle="--", linewidth=1.0, label="size of the baseline"))
    axes.grid(True)
    axes.set_xlabel("weight files, MB")
    axes.set_ylabel(loss)
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)


def _name(axes: Axes, points: Sequence[FrontPoint], joined: Sequence[FrontPoint]) -> None:
    """Writes each name where it covers no mark, no line and no other name; the nearest such place wins."""
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent()
    taken: list[Bbox] = []
    for p in points:
        ends = axes.transData.transform([(p.megabytes, max(p.low, axes.get_ylim()[0])), (p.megabytes, p.high)])
        x, y = axes.transData.transform((p.megabytes, p.loss))
        taken += [Bbox([ends[0] - 2, ends[1] + 2]), Bbox([[x - 6, y - 6], [x + 6, y + 6]])]
    corners = [
        axes.transData.transform((p.megabytes, loss))
        for i, p in enumerate(joined)
        for loss in ([joined[i - 1].loss, p.loss] if i else [p.loss])
    ]
    for (x0, y0), (x1, y1) in pairwise(corners):
        taken.append(Bbox([[min(x0, x1) - 1.5, min(y0, y1) - 1.5], [max(x0, x1) + 1.5, max(y0, y1) + 1.5]]))
    for p in points:
        best = min(_PLACES, key=lambda place: _cost(axes, p, place, taken, frame))  # of equals the first, the nearest
        taken.append(_box(_write(axes, p, best)))


def _write(axes: Axes, point: FrontPoint, place: _Place) -> Annotation:
    offset, across, up = place
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6} if abs(offset[1]) > 10 else None
    return axes.annotate(
        label(point.label, 38), (point.megabytes, point.loss), offset, textcoords="offset points", ha=across, va=up,
        fontsize=8, arrowprops=line, zorder=4,
    )  # fmt: skip


def _box(text: Annotation) -> Bbox:
    """The frame of the letters alone, in pixels, without the line to the mark."""
    from matplotlib.text import Text

    text.get_window_extent()  # moves the letters to their place
    return Text.get_window_extent(text)


def _cost(axes: Axes, point: FrontPoint, place: _Place, taken: Sequence[Bbox], frame: Bbox) -> float:
    """What a name would cover at a place, and what its line would cross; leaving the frame costs most."""
    text = _write(axes, point, place)
    box = _box(text)
    text.remove()
    covered = sum(_overlap(box, other) for other in taken) + 4 * (box.width * box.height - _overlap(box, frame))
    if abs(place[0][1]) <= 10:
        return covered
    x0, y0 = axes.transData.transform((point.megabytes, point.loss))
    x1, y1 = (box.x0 + box.x1) / 2, box.y0 if place[0][1] > 0 else box.y1
    steps = [(x0 + t / 12 * (x1 - x0), y0 + t / 12 * (y1 - y0)) for t in range(3, 12)]
    return covered + 40 * sum(other.contains(*step) for step in steps for other in taken)


def _overlap(one: Bbox, other: Bbox) -> float:
    """Common area in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)
