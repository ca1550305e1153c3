"""Pictures of scores and verdicts, drawn by matplotlib, which is imported when the first one is drawn.

Each function takes plain rows and returns a matplotlib Figure; `style.svg` and `style.png` turn it into bytes.
"""

from compress.evaluation.reports.plots.forest import ForestRow, forest
from compress.evaluation.reports.plots.front import FrontPoint, front
from compress.evaluation.reports.plots.histograms import histograms
from compress.evaluation.reports.plots.layers import layer_errors
from compress.evaluation.reports.plots.learning import learning
from compress.evaluation.reports.plots.percentiles import PercentileCurve, percentiles
from compress.evaluation.reports.plots.speeds import SpeedCurve, speeds
from compress.evaluation.reports.plots.style import png, svg
from compress.evaluation.reports.plots.trend import TrendPanel, TrendPoint, trend

__all__ = [
    "ForestRow",
    "FrontPoint",
    "PercentileCurve",
    "SpeedCurve",
    "TrendPanel",
    "TrendPoint",
    "forest",
    "front",
    "histograms",
    "layer_errors",
    "learning",
    "percentiles",
    "png",
    "speeds",
    "svg",
    "trend",
]
