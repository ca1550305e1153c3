"""Shared value types and the shape legend that every docstring uses.

Shape legend
    weight       (out, in)       float, the orientation of `torch.nn.Linear`
    codes        (out, in)       int8, signed: symmetric and asymmetric codes both lie in [-2^(b-1), 2^(b-1)-1];
                                 float8_e4m3fn for FP8; uint8 for 4-bit floats, sign << 3 | index in `E2M1`,
                                 and for NF4, index in `NF4`
    scale        (out, groups)   in its stored dtype; groups = in / group_size, or 1 per channel; FP8 also (1,) per
                                 tensor and (out / 128, in / 128) per tile, rounded up; float8_e4m3fn or the uint8
                                 exponents of E8M0 for blocks of floats, uint8 codes of `NestedScales` for NF4
    divisor      (1,)            float32, of all scales of a matrix: NVFP4's global scale, else absent (None)
    zero_point   (out, groups)   int8, signed, absent (None) for symmetric schemes
    x            (tokens, in)    inputs of a linear
    input_scale  (1,)            in the dtype of the weight's scale, where inputs are rounded with a calibrated scale
    hessian      (in, in)        float32, sum over tokens of x x^T divided by the number of tokens

A weight is reconstructed as (codes - zero_point) * scale, or as the codes' values * scale / divisor. A scale is rounded
to its stored dtype first and codes are computed from the rounded scale, so what is written is what was optimised.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.numerics.floats import BlockFloatScheme, Fp8Scheme
from compress.numerics.inputs import E2M1, FP8_HIGHEST, FP8_TILE, InputScheme, ScaleType
from compress.numerics.integers import IntScheme, ternary_scheme
from compress.numerics.normal_floats import NF4, SCALES_PER_RANGE, NestedScales, NormalFloatScheme
from compress.numerics.quantized import QuantizedTensor, Scheme

__all__ = [
    "E2M1",
    "FP8_HIGHEST",
    "FP8_TILE",
    "NF4",
    "SCALES_PER_RANGE",
    "BlockFloatScheme",
    "Fp8Scheme",
    "InputScheme",
    "IntScheme",
    "NestedScales",
    "NormalFloatScheme",
    "QuantizedTensor",
    "ScaleType",
    "Scheme",
    "Sparsity",
    "ternary_scheme",
]

LONGEST_PATTERN = 1024


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Which share of a linear's weights is zero; with `of`, `kept` of every `of` consecutive inputs stay (n:m)."""

    share: float
    kept: int | None = None
    of: int | None = None

    @classmethod
    def parse(cls, pattern: str) -> Sparsity:
        """The sparsity of a pattern n:m such as `2:4`. ValueError for what is none."""
        kept, _, of = pattern.partition(":")
        if kept.isdecimal() and of.isdecimal() and 0 < int(kept) < int(of) <= LONGEST_PATTERN:
            return cls(1 - int(kept) / int(of), int(kept), int(of))
        raise ValueError(f"is not a pattern n:m with 0 < n < m <= {LONGEST_PATTERN}, such as 2:4")

    @property
    def name(self) -> str:
        """As the field writes it: `2:4`, or a percentage."""
        return f"{100 * self.share:g}%" if self.of is None else f"{self.kept}:{self.of}"

    @property
    def label(self) -> str:
        """In one word that a directory can be called: `sparse50`, `2of4`."""
        return f"sparse{100 * self.share:g}" if self.of is None else f"{self.kept}of{self.of}"

    def fits(self, in_features: int) -> bool:
        """Whether the pattern's length divides `in_features`."""
        return self.of is None or in_features % self.of == 0
