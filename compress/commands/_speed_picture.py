"""`compress bench --plot`: tokens per second by batch size as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.commands._files import check_writable
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.workflows.bench import Bench


def check_plot(path: Path | None) -> None:
    """Raises UserError where `path`, given with --plot, cannot become an SVG or PNG file; does nothing for None."""
    if path is not None and path.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"--plot {path}: pictures are SVG or PNG", "end the file's name in .svg or .png")
    check_writable("--plot", path)


def picture(found: Bench, suffix: str) -> bytes:
    """The bytes of the picture; `suffix` is `.svg` or `.png`."""
    from compress.evaluation.reports import plots

    both = [(found.model.name, found.cost)]
    if found.baseline is not None and found.cost_baseline is not None:
        both.append((found.baseline.name, found.cost_baseline))
    named = [(f"{name}, {cost.workload.runtime} {cost.workload.dtype}", cost) for name, cost in both]
    work = found.cost.workload
    drawing = plots.speeds(
        [plots.SpeedCurve.decoding(*each) for each in named],
        [plots.SpeedCurve.reading(*each) for each in named],
        f"{work.device}, {work.threads} threads, prompts of {work.prompt_tokens}, {work.new_tokens} new tokens",
    )
    return plots.svg(drawing) if suffix == ".svg" else plots.png(drawing)
