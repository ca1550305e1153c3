"""How far a student is from its teacher, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.evaluation.reports.plots.style import MARKERS, SERIES, figure, label, log_range, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FLOOR = 1e-9


def learning(points: Sequence[tuple[int, float]], title: str = "") -> Figure:
    """(step, held-out KL in nats) as a line over the steps, the KL on a logarithmic axis."""
    with look():
        drawing = figure(7.6, 3.6)
        axes = drawing.add_subplot()
        steps, values = [step for step, _ in points], [max(kl, _FLOOR) for _, kl in points]
        axes.plot(steps, values, color=SERIES[0], marker=MARKERS[0], linewidth=1.8, markersize=5)
        log_range(axes, min(values, default=0.01), max(values, default=1.0))
        axes.grid(True)
        axes.set_xlabel("steps")
        axes.set_ylabel("KL to the teacher, nats")
        if title:
            axes.set_title(label(title, 84))
    return drawing
