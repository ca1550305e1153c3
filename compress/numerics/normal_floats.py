"""NF4, the 4-bit normal float of QLoRA (Dettmers et al., arXiv:2305.14314), with scales that are quantised in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from compress.numerics.quantized import QuantizedTensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What codes stand for: quantiles of a normal distribution scaled to [-1, 1], zero among them."""
SCALES_PER_RANGE = 256
TABLE_BYTES = 4 * (len(NF4) + 256)
"""What every linear stores to spell the two tables of codes."""


@dataclass(frozen=True, eq=False, slots=True)
class NestedScales:
    """How uint8 codes of scales are read: table[code] * range + middle, in float32.

    table (256,): what codes stand for, ascending. ranges (n,): one for every 256 scales, counted along rows. middle
    (1,): the same for the whole matrix. dtype: what the weight is decoded into.
    """

    table: torch.Tensor
    ranges: torch.Tensor
    middle: torch.Tensor
    dtype: torch.dtype

    def spread(self, shape: torch.Size) -> torch.Tensor:
        """The range of each of so many scales."""
        return self.ranges.repeat_interleave(SCALES_PER_RANGE)[: shape.numel()].reshape(shape)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Scales float32 in the shape of their codes."""
        return self.table[codes.int()] * self.spread(codes.shape) + self.middle


@dataclass(frozen=True, slots=True)
class NormalFloatScheme:
    """4-bit codes of `NF4` in blocks of 64 inputs, each scaled by an 8-bit code of its largest magnitude."""

    bits = 4
    group_size = 64
    symmetric = True
    inputs = None
    spans_matrix = False
    name = "NF4"
    label = "nf4"

    def groups(self, in_features: int) -> int:
        """Number of scales per output row."""
        return in_features // self.group_size

    def fits(self, in_features: int) -> bool:
        """Whether blocks divide `in_features`."""
        return in_features % self.group_size == 0

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """Stored bits per weight of one linear, as `IntScheme.bits_per_weight` counts; `scale_bits` is not used."""
        stored = 4 + 8 / self.group_size
        if out_features is None:
            return stored + 32 / (self.group_size * SCALES_PER_RANGE)
        weights = in_features * out_features
        ranges = -(-weights // (self.group_size * SCALES_PER_RANGE))
        return stored + (32 * ranges + 8 * TABLE_BYTES) / weights

    def decode(self, quantized: QuantizedTensor) -> torch.Tensor:
        """As `QuantizedTensor.dequantize`; in the dtype that is stored, as the bitsandbytes package decodes these."""
        import torch

        assert quantized.nested is not None
        values = torch.tensor(NF4)[quantized.codes.int()].unflatten(1, (-1, self.group_size))
        scale = quantized.nested.decode(quantized.scale)
        return (values * scale.unsqueeze(-1)).flatten(1).to(quantized.nested.dtype)
