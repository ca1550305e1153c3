"""Numbers of gates and scores as words: each unit as people read it, the same in every report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.evaluation.record_base import IntervalRecord
    from compress.evaluation.verdict import GateResult

NONE = "-"


def value(number: float | None, unit: str = "") -> str:
    """One number: shares in percent, bytes in decimal units, the rest to four significant digits; `-` for None."""
    if number is None or not math.isfinite(number):
        return NONE
    if unit == "share":
        return f"{_digits(100 * number)}%"
    if unit == "bytes":
        return size(number)
    return _digits(number)


def size(count: float | None) -> str:
    """Bytes as disks are sold and files listed: 4.55 MB; `-` for None."""
    if count is None:
        return NONE
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.0f} B"


def with_unit(text: str, unit: str) -> str:
    """The text followed by its unit, unless the number already shows it or there is nothing to show."""
    return text if text == NONE or unit in ("", "share", "bytes", "ratio") else f"{text} {unit}"


def interval(estimate: float | None, low: float | None, high: float | None, unit: str = "") -> str:
    """`0.01596 [0.01473, 0.01718]`; an end that is not known is open; the estimate alone where both ends equal it."""
    if estimate is None or (low == estimate and high == estimate):
        return value(estimate, unit)
    ends = ("(-∞" if low is None else f"[{value(low, unit)}", "∞)" if high is None else f"{value(high, unit)}]")
    return f"{value(estimate, unit)} {ends[0]}, {ends[1]}"


def of_record(found: IntervalRecord | None, unit: str = "") -> str:
    """An interval of an eval record; `-` where there is none."""
    return NONE if found is None else interval(found.estimate, found.low, found.high, unit)


def measured(gate: GateResult) -> str:
    """The estimate of a gate with its bounds."""
    return with_unit(interval(gate.estimate, gate.low, gate.high, gate.unit), gate.unit)


def limit(gate: GateResult) -> str:
    """The limit of a gate: `≤ 2%`."""
    return limit_text(gate.limit, gate.rule, gate.unit)


def limit_text(number: float | None, rule: str, unit: str) -> str:
    """A limit with its direction and unit; `-` where there is none."""
    if number is None:
        return NONE
    return f"{'≤' if rule == 'at most' else '≥'} {with_unit(value(number, unit), unit)}"


def _digits(number: float) -> str:
    """Four significant digits, without an exponent where the number is of everyday size."""
    if number != 0 and not 1e-4 <= abs(number) < 1e6:
        return f"{number:.4g}"
    decimals = 4 if number == 0 else max(0, 3 - math.floor(math.log10(abs(number))))
    text = f"{number:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
