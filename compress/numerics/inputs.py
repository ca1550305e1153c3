"""How inputs are rounded, and what all layouts share. Shapes are those of `compress.types`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScaleType = Literal["float", "e4m3", "e8m0"]

FP8_HIGHEST = 448.0
"""The largest number of FP8 E4M3."""
FP8_TILE = 128
"""Rows and columns that share a scale where FP8 weights are scaled by tile."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of 4-bit floats, by index."""


@dataclass(frozen=True, slots=True)
class InputScheme:
    """How the inputs of a linear are rounded before the product: int8, or floats E4M3 (8 bits) or E2M1 (4); symmetric.

    granularity "token": one scale per token, "group": one per token and `group_size` inputs, both found as the tokens
    come (dynamic); "tensor": one scale, calibrated beforehand and stored (static).
    scale_type: what a scale is rounded to: "float" not at all, "e8m0" powers of two, "e4m3" FP8 after multiplication
    with one calibrated number, which is stored (NVFP4). narrow: int8 in 127 steps of each sign, as BitNet rounds.
    """

    type: Literal["int", "float"]
    granularity: Literal["token", "group", "tensor"]
    group_size: int | None = None
    bits: int = 8
    scale_type: ScaleType = "float"
    narrow: bool = False

    @property
    def dynamic(self) -> bool:
        """Whether nothing about the inputs is stored."""
        return self.granularity != "tensor" and self.scale_type != "e4m3"

    @property
    def steps(self) -> float:
        """A scale is the largest |x| divided by this: half of the 255 steps of int8, as for weights, 448 or 6."""
        if self.type == "int":
            return 127.0 if self.narrow else 127.5
        return FP8_HIGHEST if self.bits == 8 else E2M1[-1]


def per_tensor(inputs: InputScheme | None, scale_bits: int, in_features: int, out_features: int | None) -> float:
    """Bits per weight of the one scale of static inputs."""
    if inputs is None or inputs.dynamic or out_features is None:
        return 0.0
    return scale_bits / (in_features * out_features)
