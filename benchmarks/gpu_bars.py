"""What a GPU's record is held to: each figure beside its bar, with its spread over the rounds."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_engine import PACKED

FASTER = "times_faster_than_bfloat16"
AT_LEAST: dict[str, tuple[float, tuple[str, ...]]] = {
    "4-bit layer at 1 token over bfloat16": (3.0, ("layer", "1", "W4A16-g128", FASTER)),
    "4-bit layer at 1 token, share of copy bandwidth": (0.75, ("layer", "1", "W4A16-g128", "share_of_copy_bandwidth")),
    "FP8 layer at 512 tokens over bfloat16": (1.2, ("fp8", "512", "FP8_DYNAMIC", FASTER)),
    "FP8 layer at 2048 tokens over bfloat16": (1.5, ("fp8", "2048", "FP8_DYNAMIC", FASTER)),
    "FP8 layer at 4096 tokens over bfloat16": (1.5, ("fp8", "4096", "FP8_DYNAMIC", FASTER)),
    f"decode step of an 8B shape in {PACKED} over bfloat16": (2.5, ("engine", "1", FASTER)),
    f"whole decode of an 8B shape in {PACKED} over bfloat16": (2.5, ("engine", "1", "whole_times_faster")),
}
"""By name: the bar, and where the figure stands."""
MOST_ERROR = {"products": 0.06, "attention": 0.03}
"""Of the outputs' root mean square: a bfloat16 result rounds to 2^-9 of itself, and the largest is several times that
mean. Of the largest output: shares and values are rounded to bfloat16."""


def bars(sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{figure, wanted, met, spread} of each bar whose section was run; met None where nothing was timed.

    A section that ended before it reached a figure misses its bar.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, (wanted, place) in AT_LEAST.items():
        if place[0] not in sections:
            continue
        value: Any = sections
        for part in place:
            value = value.get(part) if isinstance(value, dict) else None
        dry = value is None and "error" not in sections[place[0]]
        figure = None if value is None else value["median"]
        met = None if dry else figure is not None and figure >= wanted
        found[name] = {"figure": figure, "wanted": wanted, "met": met, "spread": value}
    for name, wanted in MOST_ERROR.items():
        errors = [error for row in sections.get("parity", {}).get(name, {}).values() for error in row.values()]
        if "parity" in sections:
            figure = next((error for error in errors if error != error), max(errors, default=None))  # NaN is the worst
            met = figure is not None and figure <= wanted
            spread = {"least": min(errors), "most": max(errors)} if errors else None
            found[f"error of {name}"] = {"figure": figure, "wanted": wanted, "met": met, "spread": spread}
    return found
