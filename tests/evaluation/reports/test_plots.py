"""Pictures: the same bytes every time, nothing cut off, no two labels on top of each other, no colours alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from compress.evaluation.reports import plots
from compress.evaluation.reports.plots.front import best_for_size
from compress.evaluation.reports.plots.style import MARKERS, SERIES, VERDICTS, label
from compress.evaluation.reports.verdict_document import forest_rows
from tests.evaluation.reports.made import mixed

LONG = "a/very-long-organisation-name/a-model-with-an-even-longer-name-w4a16-g128-and-more"


def texts(drawing: Figure) -> list[tuple[str, Bbox]]:
    """Every visible text with its frame in pixels; the frame of a slanted text is larger than the text."""
    drawing.draw_without_rendering()
    beyond = {
        id(tick.label1)
        for axes in drawing.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    found = []
    for text in drawing.findobj(Text):
        if id(text) not in beyond and text.get_visible() and text.get_text().strip():
            found.append((text.get_text(), Text.get_window_extent(text)))  # without an annotation's line
    return found


def unreadable(drawing: Figure) -> list[str]:
    """Texts that leave the picture, and pairs that lie on each other."""
    frame = drawing.bbox
    slanted = {text.get_text() for text in drawing.findobj(Text) if text.get_rotation() not in (0.0, 90.0)}
    found, shown = [], []
    for text, box in texts(drawing):
        if box.x0 < -0.5 or box.y0 < -0.5 or box.x1 > frame.x1 + 0.5 or box.y1 > frame.y1 + 0.5:
            found.append(f"cut off: {text}")
        if text not in slanted:
            shown.append((text, box))
    for (one, a), (other, b) in combinations(shown, 2):
        width = min(a.x1, b.x1) - max(a.x0, b.x0)
        height = min(a.y1, b.y1) - max(a.y0, b.y0)
        if width > 1.0 and height > 2.0:
            found.append(f"overlap: {one} / {other}")
    return found


def forest(count: int = 8) -> Figure:
    rows = forest_rows(mixed())
    long = plots.ForestRow(LONG, "kl_mean", 1.23, 1.1, 1.4, 0.02, "at most", "FAIL", LONG * 2)
    return plots.forest([*rows, long][:count] if count < 9 else [*rows, long], f"{LONG} against {LONG}: FAIL")


def front(count: int = 7) -> Figure:
    sizes = [4.55, 4.55, 4.56, 4.1, 4.1, 3.6, 6.6, 4.56, 4.57][:count]
    losses = [0.008, 0.016, 0.026, 0.032, 0.143, 1.23, 0.0003, 0.0165, 0.0172][:count]
    best = best_for_size(list(zip(sizes, losses, strict=True)))
    points = [
        plots.FrontPoint(f"tales-6m-method{i}-w{i}a16-g128", s, k, 0.9 * k, 1.1 * k, b)
        for i, (s, k, b) in enumerate(zip(sizes, losses, best, strict=True))
    ]
    return plots.front(points, "mean KL to tales-6m, nats per token", "size and quality", 11.55)


def percentiles() -> Figure:
    curves = [
        plots.PercentileCurve(LONG, ((0.5, 0.003), (0.1, 0.02), (0.01, 0.07), (0.001, 0.12), (1 / 85000, 0.9))),
        plots.PercentileCurve("b", ((0.5, 0.8), (0.1, 3.0), (0.01, 5.2), (0.001, 7.3), (1 / 85000, 11.0))),
    ]
    return plots.percentiles(curves, "KL by token percentile")


def layers() -> Figure:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    made: list[dict[str, Any]] = [
        {"name": f"model.layers.{b}.{n}", "block": b, "error": 0.001 * (1 + b) * (1 + i)}
        for b in range(24)
        for i, n in enumerate(names)
    ]
    return plots.layer_errors(made, "output", "relative output error")


def trend(runs: int = 40) -> Figure:
    def points(series: str, sign: float) -> tuple[plots.TrendPoint, ...]:
        return tuple(
            plots.TrendPoint(i, sign * i, sign * i - 1, sign * i + 1, series, i % 10 == 0) for i in range(runs)
        )

    panels = [
        plots.TrendPanel(
            "lambada", "points", points("a 1234", -0.1), tuple((i, -5.0) for i in range(runs)), -1, "flagged"
        ),
        plots.TrendPanel(LONG, "nats", points("b 5678", 0.1), ((0, 4.0),), 1),
    ]
    return plots.trend(panels, [f"v1.{i} abcdef{i:02}" for i in range(runs)], "Gate values")


def speeds(models: int = 2, batches: Sequence[int] = (1, 2, 4, 8, 16, 32)) -> Figure:
    def curves(scale: float) -> list[plots.SpeedCurve]:
        return [
            plots.SpeedCurve(
                f"{LONG} {i}", tuple((b, (i + 1) * scale * b, 0.9 * scale * b, 3 * scale * b) for b in batches)
            )
            for i in range(models)
        ]

    return plots.speeds(curves(30.0), curves(700.0), "cpu, 2 threads, prompts of 128, 32 new tokens")


FIGURES = {
    "forest": forest,
    "front": front,
    "percentiles": percentiles,
    "layers": layers,
    "trend": trend,
    "speeds": speeds,
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_label_can_be_read(name: str) -> None:
    assert unreadable(FIGURES[name]()) == []


def test_smallest_and_largest_pictures_can_be_read() -> None:
    assert unreadable(forest(1)) == []
    assert unreadable(speeds(1, (4,))) == []
    assert unreadable(forest(9)) == []
    assert unreadable(front(1)) == []
    assert unreadable(front(9)) == []
    assert unreadable(trend(1)) == []
    assert unreadable(trend(3)) == []


def test_the_longest_verdict_has_room() -> None:
    row = plots.ForestRow("tail", "kl_p999", 1.4, 1.0, 2.0, 1.0, "at most", "INCONCLUSIVE", "1.379 [1, 2]", True)
    drawing = plots.forest([row])
    drawing.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in drawing.axes[0].texts}
    verdict, numbers = boxes["INCONCLUSIVE, secondary"], boxes["1.379 [1, 2]"]
    assert verdict.x1 + 0.1 * drawing.dpi < numbers.x0


def test_the_legend_of_many_curves_hides_none() -> None:
    points = ((0.5, 0.003), (0.1, 0.02), (0.01, 0.07), (0.001, 0.12))
    curves = [plots.PercentileCurve(f"rtn-w{k}-g128", points) for k in range(9)]
    drawing = plots.percentiles(curves)
    assert unreadable(drawing) == []
    drawing.canvas.draw()
    (axes,), (legend,) = drawing.axes, drawing.legends
    assert not axes.get_window_extent().overlaps(legend.get_window_extent())
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == len(curves)


def test_the_check_finds_what_cannot_be_read() -> None:
    drawing = front(2)
    drawing.text(0.97, 0.5, "runs out of the picture")
    assert unreadable(drawing) == ["cut off: runs out of the picture"]
    drawing = front(2)
    for _ in range(2):
        drawing.text(0.5, 0.93, "twice")
    assert any("overlap: twice / twice" in line for line in unreadable(drawing))


@pytest.mark.parametrize("name", FIGURES)
def test_equal_pictures_have_equal_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    first = plots.svg(FIGURES[name]())
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    monkeypatch.setitem(matplotlib.rcParams, "svg.hashsalt", "another")
    assert plots.svg(FIGURES[name]()) == first
    assert matplotlib.rcParams["font.size"] == 20.0
    ElementTree.fromstring(first)
    assert b"<metadata" not in first
    assert b"font-family" not in first


def test_the_forest_shows_estimate_bounds_and_limit() -> None:
    """The marks lie where the shares of the allowed loss are: worked out here by hand."""
    axes = forest(8).axes[0]
    lines = {
        (round(x, 4), y)
        for line in axes.lines
        if len(line.get_xdata()) == 1
        for x, y in zip(*line.get_data(), strict=True)
    }
    assert (round(1 / 2.536, 4), 0) in lines
    assert (round(0.0141 / 0.02, 4), 1) in lines
    assert (round(0.031 / 0.02, 4), 2) in lines
    assert (round(0.095 / 0.11, 4), 3) in lines
    assert (1.3, 4) in lines
    spans = {
        (round(a, 4), round(b, 4)) for line in axes.lines if len(line.get_xdata()) == 2 for a, b in [line.get_xdata()]
    }
    assert (0.59, 0.82) in spans
    assert (round(0.09 / 0.11, 4), round(0.1 / 0.11, 4)) in spans
    assert (0.1, 2.5) in spans
    assert any(list(line.get_xdata()) == [1.0, 1.0] for line in axes.lines)


def test_what_is_far_out_is_an_arrow_at_the_edge() -> None:
    row = plots.ForestRow("kl", "kl_mean", 1.23, 1.1, 1.4, 0.02, "at most", "FAIL", "")
    axes = plots.forest([row]).axes[0]
    right = axes.get_xlim()[1]
    assert right <= 2.5
    assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == 9] == [[right]]
    assert not any(line.get_marker() == 8 for line in axes.lines)


def test_colours_are_never_alone() -> None:
    assert len({marker for _, marker in VERDICTS.values()}) == len(VERDICTS)
    pairs = {(SERIES[k % len(SERIES)], MARKERS[k % len(MARKERS)]) for k in range(len(SERIES) * len(MARKERS))}
    assert len(pairs) == len(SERIES) * len(MARKERS)


def test_names_from_outside_are_drawn_as_they_are() -> None:
    row = plots.ForestRow(
        "$\\frac{1}{2}$ 模型 \x1b[0m", "kl_mean", 0.01, 0.009, 0.011, 0.02, "at most", "PASS", "$x^2$"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = plots.forest([row])
        plots.svg(drawing)
    shown = [text for text, _ in texts(drawing)]
    assert "$\\frac{1}{2}$ ?? ?[0m" in shown
    assert "$x^2$" in shown


def test_a_long_label_keeps_both_ends() -> None:
    assert label("abcdefghij", 7) == "abc…hij"
    assert label("abcdefg", 7) == "abcdefg"
    assert len(label(LONG, 30)) == 30


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1.0, 2.0), (2.0, 1.0), (2.0, 3.0)], [True, True, False]),
        ([(1.0, 1.0), (1.0, 1.0)], [True, True]),
        ([(1.0, 1.0), (1.0, 2.0), (0.5, 1.0)], [False, False, True]),
        ([], []),
    ],
)
def test_the_front_is_what_none_beats(points: list[tuple[float, float]], expected: list[bool]) -> None:
    assert best_for_size(points) == expected
