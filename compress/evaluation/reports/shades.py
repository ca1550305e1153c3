"""How strongly the cells of a table are tinted."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shades = tuple[tuple[float | None, ...], ...]


def logarithmic(cells: Sequence[Sequence[float | None]], *, low_is_hot: bool = False) -> Shades:
    """0 for the smallest number above nothing and 1 for the largest, on a logarithmic scale; None stays None.

    low_is_hot: the other way round, with 1 for zeros. Equal numbers all give 0.
    """
    known = [math.log(cell) for row in cells for cell in row if cell is not None and cell > 0]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)

    def shade(cell: float | None) -> float | None:
        if cell is None:
            return None
        place = (math.log(cell) - low) / (high - low) if cell > 0 and high > low else 0.0
        return (1.0 - place if high > low or cell <= 0 else 0.0) if low_is_hot else place

    return tuple(tuple(shade(cell) for cell in row) for row in cells)
