"""One look for every picture: colours that colour-blind readers tell apart, shapes that say the same, fixed bytes.

Colours are those of Okabe and Ito (Color Universal Design, 2008). Letters are drawn as outlines, so that a picture
needs no font where it is shown.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#767676"

SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

VERDICTS: dict[str, tuple[str, str]] = {
    "PASS": (BLUE, "o"),
    "FAIL": (VERMILLION, "X"),
    "INCONCLUSIVE": (ORANGE, "D"),
    "WAIVED": (PURPLE, "^"),
    "SKIPPED": (GREY, "s"),
}
"""Verdict -> colour and marker. No two share a marker: the picture reads the same without colours."""

_LOOK: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "compress",
    "text.parse_math": False,
}


@contextmanager
def look() -> Iterator[None]:
    """The settings that every picture is drawn and saved under, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for name, value in _LOOK.items():
            matplotlib.rcParams[name] = value  # type: ignore[index]
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches, whose margins follow what is drawn; no window system is touched."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg(drawing: Figure) -> bytes:
    """The figure as a standalone SVG file: no date, no version, equal figures give equal bytes."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with look():
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="svg", metadata=nothing)
    return buffer.getvalue()


def png(drawing: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG with a palette: pictures of few colours take a third of the bytes, and notebooks keep many."""
    from PIL import Image

    with look():
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    reduced = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(reduced, format="png", optimize=True)
    return reduced.getvalue()


def label(text: str, width: int = 40) -> str:
    """The text as a label: one line, at most `width` characters (cut in the middle), only letters the font has."""
    known = _letters()
    line = "".join(c if ord(c) in known and c.isprintable() else "?" for c in " ".join(text.split()))
    if len(line) <= width:
        return line
    head = (width - 1) // 2
    return f"{line[:head]}…{line[len(line) - (width - 1 - head) :]}"


def number(value: float | None, digits: int = 3) -> str:
    """A number for a label; `?` where there is none."""
    return "?" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def plain_log(axis: Axis, span: float) -> None:
    """Ticks of a logarithmic axis as plain numbers (0.02), at 1, 2 and 5 of each decade, closer where it is short.

    span: the axis' largest value over its smallest.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.set_major_locator(
        LogLocator(base=10, subs=(1.0, 2.0, 5.0) if span > 6.0 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=12)
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def log_range(axes: Axes, low: float, high: float) -> None:
    """A logarithmic vertical axis around positive values, at least a factor of 3 tall, so that ticks never crowd."""
    axes.set_yscale("log")
    room = max(1.25, math.sqrt(3.0 / max(high / low, 1.0)))
    axes.set_ylim(low / room, high * room)
    plain_log(axes.yaxis, high / low * room * room)


@functools.cache
def _letters() -> frozenset[int]:
    """Code points that the font of the pictures can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())
