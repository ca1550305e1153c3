"""KL per token from the median to the largest: two models of one mean KL differ in how bad their worst tokens are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.evaluation.reports.plots.style import MARKERS, SERIES, figure, label, log_range, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compress.evaluation.records import TextRecord

_TICKS = {0.5: "50%", 0.1: "90%", 0.01: "99%", 0.001: "99.9%", 0.0001: "99.99%", 0.00001: "99.999%"}
_FLOOR = 1e-6
_WIDTH, _HEIGHT, _ROW = 7.6, 4.0, 0.2


@dataclass(frozen=True, slots=True)
class PercentileCurve:
    """One model on one text: (share of the tokens that lie above, KL in nats), the median first."""

    label: str
    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, name: str, text: TextRecord) -> PercentileCurve | None:
        """The curve of a scored text; None where it was scored alone."""
        from compress.evaluation.records import KL_THRESHOLDS

        exact, rows = text.summary.kl_percentiles, text.clusters.kl_above
        if exact is None or rows is None:
            return None
        total = sum(text.clusters.tokens)
        counts = [sum(row[k] for row in rows) for k in range(len(KL_THRESHOLDS))]
        points = {0.5: exact.p50, 0.1: exact.p90, 0.01: exact.p99, 0.001: exact.p999}
        points = {share: kl for share, kl in points.items() if share * total >= 1.0}
        for count, threshold in zip(counts, KL_THRESHOLDS, strict=True):
            if 0 < count <= total / 2:
                points.setdefault(count / total, threshold)
        points.setdefault(1.0 / total, exact.max)
        return cls(name, tuple(_rising(sorted(points.items(), reverse=True))))


def percentiles(curves: Sequence[PercentileCurve], title: str = "") -> Figure:
    """Percentile of the tokens, the tail stretched, against their KL on a logarithmic axis."""
    names = [label(curve.label, 44) for curve in curves]
    columns = max(1, min(len(names), int(_WIDTH / (0.7 + 0.085 * max(map(len, names), default=1)))))
    with look():
        drawing = figure(_WIDTH, _HEIGHT + _ROW * math.ceil(len(names) / columns))
        axes = drawing.add_subplot()
        values = [max(kl, _FLOOR) for curve in curves for _, kl in curve.points]
        for k, curve in enumerate(curves):
            shares, kls = zip(*curve.points, strict=True)
            marks = [i for i, share in enumerate(shares) if share in _TICKS or i == len(shares) - 1]
            axes.plot(
                shares, [max(kl, _FLOOR) for kl in kls], label=names[k], linewidth=1.8,
                color=SERIES[k % len(SERIES)], linestyle="-" if k < len(SERIES) else "--",
                marker=MARKERS[k % len(MARKERS)], markevery=marks, markersize=6,
            )  # fmt: skip
        log_range(axes, min(values, default=0.01), max(values, default=1.0))
        least = min((share for curve in curves for share, _ in curve.points), default=0.001)
        axes.set_xscale("log")
        axes.set_xlim(0.56, least / 1.25)
        ticks = [share for share in _TICKS if share >= least]
        axes.set_xticks(ticks, [_TICKS[share] for share in ticks])
        axes.minorticks_off()
        axes.grid(True)
        axes.set_xlabel("percentile of the tokens (the last mark of a line is its worst token)")
        axes.set_ylabel("KL to the baseline, nats")
        drawing.legend(loc="outside lower center", ncols=columns)
        if title:
            axes.set_title(label(title, 84))
    return drawing


def _rising(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points whose KL does not fall: a threshold's count bounds a percentile, and rounding may put it a hair below."""
    kept: list[tuple[float, float]] = []
    for share, kl in points:
        kept.append((share, max(kl, kept[-1][1]) if kept else kl))
    return kept
