"""Where the error went: the relative error of every linear, by decoder block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from compress.evaluation.reports.plots.style import MARKERS, SERIES, figure, label, log_range, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FLOOR = 1e-9


def kinds(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Kind of linear (`q_proj`; experts of a block together) -> (block, error) in order."""
    found: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        found.setdefault(kind_of(str(layer["name"])), []).append((int(layer["block"]), float(layer["error"])))
    return {name: sorted(points) for name, points in found.items()}


def layer_errors(layers: Sequence[Mapping[str, Any]], of: Literal["output", "weight"], title: str = "") -> Figure:
    """One mark per linear: block to the right, error upwards on a logarithmic axis, one shape per kind of linear.

    layers: mappings with `name`, `block` and `error`, the squared error as a share of the squared output or weight.
    """
    with look():
        from matplotlib.ticker import MaxNLocator

        drawing = figure(8.6, 3.6)
        axes = drawing.add_subplot()
        series = kinds(layers)
        values = [max(error, _FLOOR) for points in series.values() for _, error in points]
        for k, (name, points) in enumerate(series.items()):
            offset = 0.5 * ((k + 0.5) / len(series) - 0.5)
            axes.plot(
                [block + offset for block, _ in points], [max(error, _FLOOR) for _, error in points],
                linestyle="none", color=SERIES[k % len(SERIES)], marker=MARKERS[k % len(MARKERS)], markersize=6,
                label=label(name, 28), mec="white", mew=0.5,
            )  # fmt: skip
        log_range(axes, min(values, default=0.001), max(values, default=1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, axis="y")
        axes.set_xlabel("decoder block")
        letter = {"output": "Y", "weight": "W"}[of]
        axes.set_ylabel(f"relative {of} error, ‖{letter} - {letter}'‖² / ‖{letter}‖²")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
        if title:
            axes.set_title(label(title, 90))
    return drawing


def kind_of(name: str) -> str:
    """The last part of the name that is a word, `experts` before it where the linear is one of many."""
    parts = name.split(".")
    words = [part for part in parts if not part.isdigit()]
    return f"experts {words[-1]}" if "experts" in parts else words[-1]
