"""Shared value types and the shape legend that every docstring uses.

Shape legend
    weight       (out, in)       float, the orientation of `torch.nn.Linear`
    codes        (out, in)       int8, signed: symmetric and asymmetric codes both lie in [-2^(b-1), 2^(b-1)-1]
    scale        (out, groups)   in its stored dtype; groups = in / group_size, or 1 per channel
    zero_point   (out, groups)   int8, signed, absent (None) for symmetric schemes
    x            (tokens, in)    inputs of a linear
    hessian      (in, in)        float32, sum over tokens of x x^T divided by the number of tokens

A weight is reconstructed as (codes - zero_point) * scale. A scale is rounded to its stored dtype first and
codes are computed from the rounded scale, so what is written is what was optimised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


LONGEST_PATTERN = 1024


@dataclass(frozen=True, slots=True)
class IntScheme:
    """Integer weight-only layout: `bits` per code, one scale per `group_size` inputs (None: per output channel)."""

    bits: int
    group_size: int | None
    symmetric: bool = True

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def name(self) -> str:
        """The scheme's name in the field, e.g. `W4A16`."""
        return f"W{self.bits}A16"

    @property
    def label(self) -> str:
        """Name, granularity and symmetry in one word, e.g. `w4a16-g128-asym`; used in directory names."""
        granularity = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.bits}a16-{granularity}" + ("" if self.symmetric else "-asym")

    def groups(self, in_features: int) -> int:
        """Number of scales per output row."""
        return 1 if self.group_size is None else in_features // self.group_size

    def fits(self, in_features: int) -> bool:
        """Whether `group_size` divides `in_features`."""
        return self.group_size is None or in_features % self.group_size == 0

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight of one linear: codes, scales and zero points (shape words not counted).

        A row of codes fills whole 32-bit words, so a width that does not come out even costs a little more.
        """
        row = 32 * math.ceil(in_features * self.bits / 32)
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return (row + per_group * self.groups(in_features)) / in_features


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


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedTensor:
    """One quantised weight: codes (out, in) int8, scale (out, groups), zero_point (out, groups) int8 or None."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: IntScheme

    def dequantize(self) -> torch.Tensor:
        """The weight (out, in) in the scale's dtype, rounded exactly as compressed-tensors rounds it."""
        out, width = self.codes.shape
        groups = self.scale.shape[1]
        codes = self.codes.reshape(out, groups, width // groups).to(self.scale.dtype)
        if self.zero_point is not None:
            codes = codes - self.zero_point.to(self.scale.dtype).unsqueeze(-1)
        return (codes * self.scale.unsqueeze(-1)).reshape(out, width)
