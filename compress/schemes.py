"""Names of numeric layouts as the field writes them: `W4A16` is 4-bit weights and 16-bit inputs.

Integer weight-only names leave the group size open. The others, which round the inputs too, say everything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from compress.errors import UserError
from compress.types import (
    FP8_TILE,
    BlockFloatScheme,
    Fp8Scheme,
    InputScheme,
    IntScheme,
    NormalFloatScheme,
    Scheme,
    ternary_scheme,
)

BITS = tuple(range(2, 9))
INTEGER_SCHEMES: tuple[str, ...] = tuple(f"W{bits}A16{suffix}" for bits in BITS for suffix in ("", "_ASYM"))

FIXED_SCHEMES: dict[str, Scheme] = {
    "W8A8": IntScheme(8, None, inputs=InputScheme("int", "token")),
    "W8A8_STATIC": IntScheme(8, None, inputs=InputScheme("int", "tensor")),
    "FP8_DYNAMIC": Fp8Scheme("channel", InputScheme("float", "token")),
    "FP8_STATIC": Fp8Scheme("tensor", InputScheme("float", "tensor")),
    "FP8_BLOCK": Fp8Scheme("tile", InputScheme("float", "group", FP8_TILE)),
    "NVFP4": BlockFloatScheme(4, "e4m3", InputScheme("float", "group", 16, 4, "e4m3")),
    "NVFP4A16": BlockFloatScheme(4, "e4m3"),
    "MXFP4": BlockFloatScheme(4, "e8m0", InputScheme("float", "group", 32, 4, "e8m0")),
    "MXFP4A16": BlockFloatScheme(4, "e8m0"),
    "MXFP8": BlockFloatScheme(8, "e8m0", InputScheme("float", "group", 32, 8, "e8m0")),
    "MXFP8A16": BlockFloatScheme(8, "e8m0"),
    "NF4": NormalFloatScheme(),
    "W2A8": ternary_scheme(),
}
"""Layouts that are complete by their names."""

MEANINGS: dict[str, str] = {
    "W8A8": "int8 weights per channel, int8 inputs per token",
    "W8A8_STATIC": "int8 weights per channel, int8 inputs with one calibrated scale",
    "FP8_DYNAMIC": "FP8 E4M3 weights per channel, FP8 inputs per token",
    "FP8_STATIC": "FP8 E4M3 weights per tensor, FP8 inputs with one calibrated scale",
    "FP8_BLOCK": "FP8 E4M3 weights per 128 x 128 tile, FP8 inputs per token and 128 inputs",
    "NVFP4": "FP4 E2M1 weights and inputs in blocks of 16, FP8 scales, one calibrated number for inputs",
    "NVFP4A16": "FP4 E2M1 weights in blocks of 16, FP8 scales",
    "MXFP4": "FP4 E2M1 weights and inputs in blocks of 32, powers of two as scales",
    "MXFP4A16": "FP4 E2M1 weights in blocks of 32, powers of two as scales",
    "MXFP8": "FP8 E4M3 weights and inputs in blocks of 32, powers of two as scales",
    "MXFP8A16": "FP8 E4M3 weights in blocks of 32, powers of two as scales",
    "W2A8": "ternary weights in 2 bits, int8 inputs per token; for BitNet b1.58",
    "NF4": "4-bit normal floats in blocks of 64, 8-bit scales; for bitsandbytes",
}


USUAL_METHODS: dict[str, str] = {
    **dict.fromkeys(("W8A8", "W8A8_STATIC"), "smoothquant"),
    "W2A8": "ternary",
    **dict.fromkeys(("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16"), "gptq"),
}
"""What is meant by a scheme without a method; `rtn` by those that are not here."""


@dataclass(frozen=True, slots=True)
class NamedScheme:
    """What a scheme name says; None is what it leaves open. `fixed` where it says everything."""

    name: str
    bits: int
    symmetric: bool | None
    fixed: Scheme | None = None
    group_size: int | Literal["channel"] | None = None


_WEIGHTS = re.compile(r"w([2-8])(a16)?(?:[-_ ](channel|g(\d+)))?([-_]asym)?")
"""Layouts of integer weights alone, as plans, tables and `--embeddings` write them."""


def parse_weight_scheme(text: str) -> dict[str, int | str | bool] | None:
    """The settings of an integer weight-only layout by its label, such as `w6a16-g64`, `W8A16-channel` or `W4 g32`.

    A group size that is left out is the usual one. None for what is no such layout.
    """
    found = _WEIGHTS.fullmatch(text.strip().lower())
    if found is None:
        return None
    settings: dict[str, int | str | bool] = {"bits": int(found[1])}
    if (group_size := _group_size(found)) is not None:
        settings["group_size"] = group_size
    return settings | ({"symmetric": False} if found[5] else {})


def _group_size(found: re.Match[str]) -> int | Literal["channel"] | None:
    """What a match of `_WEIGHTS` says of the group size."""
    if found[3] is None:
        return None
    return int(found[4]) if found[4] else "channel"


def table_label(embeddings: int | None, head: int | None) -> str:
    """What the bits of embedding and head add to the label of a layout; None where they stay as they are."""
    return "".join(f"-{name}{bits}" for name, bits in (("embed", embeddings), ("head", head)) if bits is not None)


def parse_scheme(name: str) -> NamedScheme:
    """Reads a scheme name, in any case: one of `FIXED_SCHEMES`, or of `INTEGER_SCHEMES` with or without a group size.

    Raises:
        UserError: the name is neither.
    """
    given = name.strip().upper().replace("-", "_")
    if given in FIXED_SCHEMES:
        return NamedScheme(given, FIXED_SCHEMES[given].bits, True, FIXED_SCHEMES[given])
    if "E5M2" in given:
        raise UserError(
            f"scheme {name!r}: FP8 E5M2 is not for weights: it rounds to 2 bits of mantissa where E4M3 keeps 3, for a "
            "range that a scale gives anyway",
            "use FP8_DYNAMIC, FP8_STATIC or FP8_BLOCK, which are E4M3",
        )
    found = _WEIGHTS.fullmatch(name.strip().lower())
    if found is None or found[2] is None:
        raise UserError(
            f"unknown scheme {name!r}",
            f"choose from {', '.join((*INTEGER_SCHEMES, *FIXED_SCHEMES))}, or give --bits and --group-size",
        )
    return NamedScheme(given, int(found[1]), False if found[5] else None, group_size=_group_size(found))
