"""FP8 weights in large groups, and floats of 4 or 8 bits in small blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compress.numerics.inputs import E2M1, FP8_HIGHEST, FP8_TILE, InputScheme, per_tensor

if TYPE_CHECKING:
    import torch

    from compress.numerics.quantized import QuantizedTensor


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """FP8 E4M3 weights, one scale per tensor, per output channel, or per tile of 128 x 128; `inputs` are FP8 too."""

    granularity: Literal["tensor", "channel", "tile"]
    inputs: InputScheme

    bits = 8
    symmetric = True
    group_size = None

    @property
    def spans_matrix(self) -> bool:
        """Whether a number covers the whole matrix, which linears that engines load as one matrix must then share."""
        return self.granularity == "tensor"

    @property
    def name(self) -> str:
        """The scheme's name in the field: `FP8_DYNAMIC`, `FP8_STATIC` or `FP8_BLOCK`."""
        return {"channel": "FP8_DYNAMIC", "tensor": "FP8_STATIC", "tile": "FP8_BLOCK"}[self.granularity]

    @property
    def label(self) -> str:
        """The name as directories have it, e.g. `fp8-dynamic`."""
        return self.name.lower().replace("_", "-")

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the weight's scale."""
        if self.granularity == "tensor":
            return (1,)
        if self.granularity == "channel":
            return (out_features, 1)
        return (-(-out_features // FP8_TILE), -(-in_features // FP8_TILE))

    def fits(self, in_features: int) -> bool:
        """Whether tiles divide `in_features`; the last tile of rows may be shorter."""
        return self.granularity != "tile" or in_features % FP8_TILE == 0

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """Stored bits per weight of one linear, as `IntScheme.bits_per_weight` counts them."""
        stored = 8.0 + per_tensor(self.inputs, scale_bits, in_features, out_features)
        if self.granularity == "channel":
            return stored + scale_bits / in_features
        if out_features is None:
            return stored
        rows, columns = (*self.scale_shape(out_features, in_features), 1)[:2]
        return stored + rows * columns * scale_bits / (out_features * in_features)

    def decode(self, quantized: QuantizedTensor) -> torch.Tensor:
        """As `QuantizedTensor.dequantize`."""
        scale, (out, width) = quantized.scale.float(), quantized.codes.shape
        if self.granularity == "tile":
            scale = scale.repeat_interleave(FP8_TILE, 0)[:out].repeat_interleave(FP8_TILE, 1)[:, :width]
        return quantized.codes.float() * scale


@dataclass(frozen=True, slots=True)
class BlockFloatScheme:
    """Floats of 4 bits (E2M1) or 8 (E4M3) in small blocks of inputs that share a scale of 8 bits.

    scale_type "e4m3": NVFP4, blocks of 16, and one float32 number by which all scales of a matrix are divided.
    "e8m0": the microscaling formats MXFP4 and MXFP8, blocks of 32 and powers of two for scales.
    inputs: rounded in the same way; None leaves them as they are.
    """

    bits: Literal[4, 8]
    scale_type: Literal["e4m3", "e8m0"]
    inputs: InputScheme | None = None

    symmetric = True

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return 16 if self.spans_matrix else 32

    @property
    def spans_matrix(self) -> bool:
        """As `Fp8Scheme.spans_matrix`."""
        return self.scale_type == "e4m3"

    @property
    def highest(self) -> float:
        """The largest number that a code stands for."""
        return E2M1[-1] if self.bits == 4 else FP8_HIGHEST

    @property
    def name(self) -> str:
        """The scheme's name in the field, e.g. `NVFP4`, `MXFP8A16`."""
        return f"{'NV' if self.spans_matrix else 'MX'}FP{self.bits}" + ("" if self.inputs is not None else "A16")

    @property
    def label(self) -> str:
        """The name as directories have it, e.g. `nvfp4a16`."""
        return self.name.lower()

    def groups(self, in_features: int) -> int:
        """Number of scales per output row."""
        return in_features // self.group_size

    def fits(self, in_features: int) -> bool:
        """Whether blocks divide `in_features`."""
        return in_features % self.group_size == 0

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """Stored bits per weight of one linear, as `IntScheme.bits_per_weight` counts; `scale_bits` is not used."""
        stored = self.bits + 8 / self.group_size
        if out_features is None or not self.spans_matrix:
            return stored
        return stored + 32 * (1 if self.inputs is None else 2) / (in_features * out_features)

    def decode(self, quantized: QuantizedTensor) -> torch.Tensor:
        """As `QuantizedTensor.dequantize`; bfloat16, as the compressed-tensors package decodes these."""
        import torch

        scale, codes = quantized.scale, quantized.codes
        if quantized.divisor is None:
            steps = scale.view(torch.float8_e8m0fnu).float()
        else:
            steps = scale.float() / quantized.divisor
        if self.bits == 4:
            levels = torch.tensor(E2M1)
            values = torch.cat([levels, -levels])[codes.int()]
        else:
            values = codes.float()
        return (values.unflatten(1, (scale.shape[1], -1)) * steps.unsqueeze(-1)).flatten(1).bfloat16()
