"""What a search found, as plain data (budget.json of the artifact) and as a picture (budget.png). Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compress.evaluation.reports.plots.style import BLUE, GREY, ORANGE, VERMILLION, figure, label, look, plain_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_NAME, PICTURE_NAME = "budget.json", "budget.png"


@dataclass(frozen=True)
class Point:
    """One recipe: stored bits per weight of the quantised linears, predicted KL, and the measured one if made."""

    name: str
    bits_per_weight: float
    predicted_kl: float
    measured_kl: float | None = None


@dataclass(frozen=True)
class UnitChoice:
    """One unit, the scheme that it got, and the KL that this was measured or interpolated to cost by itself."""

    name: str
    weights: int
    scheme: str
    bits_per_weight: float
    predicted_kl: float


@dataclass(frozen=True)
class BudgetReport:
    """chosen: the recipe that was made; tried: those on the way to it (`--max-kl` alone); front: the best predicted for
    each size; uniform: one scheme for everything. signal: what was measured, and on what."""

    target: str
    chosen: Point
    tried: list[Point]
    front: list[Point]
    uniform: list[Point]
    units: list[UnitChoice]
    signal: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def picture(report: BudgetReport) -> Figure:
    """Size to the right, KL upwards on a logarithmic axis: predicted front, uniform schemes, what was made."""
    with look():
        drawing = figure(7.6, 4.4)
        axes = drawing.add_subplot()
        front = sorted(report.front, key=lambda point: point.bits_per_weight)
        axes.plot(
            [p.bits_per_weight for p in front], [p.predicted_kl for p in front],
            color=BLUE, marker=".", label="mixed, predicted",
        )  # fmt: skip
        axes.plot(
            [p.bits_per_weight for p in report.uniform], [p.predicted_kl for p in report.uniform],
            linestyle="none", color=GREY, marker="s", markersize=4, label="one scheme for all, predicted",
        )  # fmt: skip
        _made(drawing, report.tried, "mixed, measured on the way", ORANGE, "D")
        _made(drawing, [report.chosen], "this artifact, measured", VERMILLION, "*", 13)
        axes.set_yscale("log")
        values = [p.predicted_kl for p in (*front, *report.uniform) if p.predicted_kl > 0]
        plain_log(axes.yaxis, max(values, default=10.0) / min(values, default=1.0))
        axes.grid(True)
        axes.set_xlabel("stored bits per weight of the quantised linears")
        axes.set_ylabel("KL to the original, nats per token")
        axes.set_title(label(f"{report.target}: {report.chosen.bits_per_weight:.3f} bits per weight", 90))
        axes.legend(loc="upper right", fontsize=8)
    return drawing


def _made(drawing: Figure, points: Sequence[Point], name: str, colour: str, marker: str, size: float = 6) -> None:
    made = [(p.bits_per_weight, p.measured_kl) for p in points if p.measured_kl is not None]
    if made:
        xs, ys = zip(*made, strict=True)
        drawing.axes[0].plot(xs, ys, linestyle="none", color=colour, marker=marker, markersize=size, label=name)
