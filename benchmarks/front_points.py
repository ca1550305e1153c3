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
    tool: str, widths: tuple[tuple[int, int | str], ...], *more: str, name: str = "", text: bool = True
) -> list[Point]:
    return [
        Point(
            tool,
            f"{name} w{bits} {group if group == 'channel' else f'g{group}'}".strip(),
            (*more, "--bits", str(bits), "--group-size", str(group)),
            text,
        )
        for bits, group in widths
    ]


def peers(model: str = "tales-6m") -> tuple[Point, ...]:
    """The other tools' points. stories260K has widths that neither 64 nor 128 divides: a scale per channel there.

    AutoRound leaves a linear alone whose sides 32 does not divide, 15 of the 35 there: that is no point of 4 or 3 bits.
    """
    small = model == "stories260K"
    by_channel: tuple[tuple[int, int | str], ...] = ((4, "channel"), (3, "channel"))
    calibrated = by_channel if small else ((4, 128), (3, 128))
    learnt = () if small else ((4, 128), (4, 64), (3, 128), (3, 64), (2, 128), (2, 64))
    return (
        *_widths("llm-compressor", calibrated, "--method", "gptq", name="gptq"),
        *_widths("llm-compressor", calibrated, "--method", "awq", name="awq"),
        *_widths("AutoRound", learnt),
        *_widths("HQQ", ((4, 64), (3, 64), (2, 64), (2, 16)), text=False),
        *(Point("llama.cpp", kind, ("--type", kind), text=False) for kind in GGUF_TYPES),
        *(Point("llama.cpp", f"{kind} imatrix", ("--type", kind)) for kind in GGUF_TYPES),
    )


def ours(model: str = "tales-6m") -> tuple[Point, ...]:
    """A point for every recipe of `front_recipes/`, or of the folder there that has the model's name."""
    own = RECIPES / model
    recipes = sorted((own if own.is_dir() else RECIPES).glob("*.yaml"))
    return tuple(Point(OURS, path.stem, recipe=path.read_text()) for path in recipes)
