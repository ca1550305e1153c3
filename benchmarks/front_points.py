"""The points of the size-quality front: every tool's settings, frozen. Change them only together with the results.

Ours are the recipes of `front_recipes/`, one file each. Their mixtures were found by `compress quantize --target-bits`
on calibration text, once; here they are run as they stand, on the token file of every seed that the other tools read.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.points import OURS, Point

RECIPES = Path(__file__).resolve().parent / "front_recipes"
GGUF_TYPES = ("Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


def _widths(
    tool: str, widths: tuple[tuple[int, int], ...], *more: str, name: str = "", text: bool = True
) -> list[Point]:
    return [
        Point(
            tool,
            f"{name} w{bits} g{group}".strip(),
            (*more, "--bits", str(bits), "--group-size", str(group)),
            text,
        )
        for bits, group in widths
    ]


PEERS: tuple[Point, ...] = (
    *_widths("llm-compressor", ((4, 128), (3, 128)), "--method", "gptq", name="gptq"),
    *_widths("llm-compressor", ((4, 128), (3, 128)), "--method", "awq", name="awq"),
    *_widths("AutoRound", ((4, 128), (4, 64), (3, 128), (3, 64), (2, 128), (2, 64))),
    *_widths("HQQ", ((4, 64), (3, 64), (2, 64), (2, 16)), text=False),
    *(Point("llama.cpp", kind, ("--type", kind), text=False) for kind in GGUF_TYPES),
    *(Point("llama.cpp", f"{kind} imatrix", ("--type", kind)) for kind in GGUF_TYPES),
)


def ours() -> tuple[Point, ...]:
    """A point for every recipe of `front_recipes/`, by name."""
    return tuple(Point(OURS, path.stem, recipe=path.read_text()) for path in sorted(RECIPES.glob("*.yaml")))
