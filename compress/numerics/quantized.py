"""A quantised weight in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.numerics.floats import BlockFloatScheme, Fp8Scheme
from compress.numerics.integers import IntScheme
from compress.numerics.normal_floats import NestedScales, NormalFloatScheme

if TYPE_CHECKING:
    import torch

Scheme = IntScheme | Fp8Scheme | BlockFloatScheme | NormalFloatScheme
"""A numeric layout: of the weight, and of the inputs where they are rounded too."""


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedTensor:
    """One quantised weight: codes (out, in), scale, zero_point (out, groups) int8 or None, divisor (1,) or None.

    nested: how codes of scales are read, where scales are quantised too (NF4).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: Scheme
    divisor: torch.Tensor | None = None
    nested: NestedScales | None = None

    def dequantize(self) -> torch.Tensor:
        """The weight (out, in): in the scale's dtype where weights alone are quantised, else float32.

        Kernels for weight-only schemes decode to that dtype; those that multiply codes apply the scale in float32.
        Blocks of floats are bfloat16, and NF4 says its dtype itself.
        """
        return self.scheme.decode(self)
