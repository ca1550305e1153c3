"""Integer weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.numerics.inputs import InputScheme, per_tensor

if TYPE_CHECKING:
    import torch

    from compress.numerics.quantized import QuantizedTensor


def ternary_scheme() -> IntScheme:
    """BitNet b1.58's: codes -1, 0 and 1 in 2 bits, inputs in 8."""
    return IntScheme(2, None, inputs=InputScheme("int", "token", narrow=True))


@dataclass(frozen=True, slots=True)
class IntScheme:
    """Integer weights: `bits` per code, one scale per `group_size` inputs (None: per output channel).

    `inputs`: how the linear's inputs are rounded; None leaves them as they are (weight-only).
    """

    bits: int
    group_size: int | None
    symmetric: bool = True
    inputs: InputScheme | None = None

    spans_matrix = False

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def name(self) -> str:
        """The scheme's name in the field, e.g. `W4A16`, `W8A8`, `W8A8_STATIC`."""
        if self.inputs is None:
            return f"W{self.bits}A16"
        return f"W{self.bits}A8" + ("" if self.inputs.dynamic else "_STATIC")

    @property
    def label(self) -> str:
        """Name, granularity and symmetry in one word, e.g. `w4a16-g128-asym` or `w8a8`; used in directory names."""
        if self.inputs is not None and self.group_size is None and self.symmetric:
            return self.name.lower().replace("_", "-")
        granularity = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"{self.name.lower()}-{granularity}" + ("" if self.symmetric else "-asym")

    def groups(self, in_features: int) -> int:
        """Number of scales per output row."""
        return 1 if self.group_size is None else in_features // self.group_size

    def fits(self, in_features: int) -> bool:
        """Whether `group_size` divides `in_features`."""
        return self.group_size is None or in_features % self.group_size == 0

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """Stored bits per weight of one linear: codes, scales and zero points (shape words not counted).

        A row of packed codes fills whole 32-bit words, so a width that does not come out even costs a little more; so
        does a column of packed zero points where `out_features` is given.
        out_features: over which a scale of the whole tensor is spread; None counts no such scale.
        """
        if self.inputs is not None and self.inputs.narrow:  # one scale for the matrix
            return self.bits + (0.0 if out_features is None else scale_bits / (in_features * out_features))
        row = 32 * math.ceil(in_features * self.bits / 32) if self.inputs is None else self.bits * in_features
        zero = self.bits if out_features is None else 32 * math.ceil(out_features * self.bits / 32) / out_features
        per_group = scale_bits + (0 if self.symmetric else zero)
        stored = (row + per_group * self.groups(in_features)) / in_features
        return stored + per_tensor(self.inputs, scale_bits, in_features, out_features)

    def decode(self, quantized: QuantizedTensor) -> torch.Tensor:
        """As `QuantizedTensor.dequantize`."""
        scale = quantized.scale if self.inputs is None else quantized.scale.float()
        codes = quantized.codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
        if quantized.zero_point is not None:
            codes = codes - quantized.zero_point.to(scale.dtype).unsqueeze(-1)
        return (codes * scale.unsqueeze(-1)).flatten(1)
