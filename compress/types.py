"""Shared value types and the shape legend that every docstring uses.

Shape legend
    weight       (out, in)       float, the orientation of `torch.nn.Linear`
    codes        (out, in)       int8, signed: symmetric and asymmetric codes both lie in [-2^(b-1), 2^(b-1)-1];
                                 float8_e4m3fn for FP8; uint8 for 4-bit floats, sign << 3 | index in `E2M1`
    scale        (out, groups)   in its stored dtype; groups = in / group_size, or 1 per channel; FP8 also (1,) per
                                 tensor and (out / 128, in / 128) per tile, rounded up; float8_e4m3fn or the uint8
                                 exponents of E8M0 for blocks of floats
    divisor      (1,)            float32, of all scales of a matrix: NVFP4's global scale, else absent (None)
    zero_point   (out, groups)   int8, signed, absent (None) for symmetric schemes
    x            (tokens, in)    inputs of a linear
    input_scale  (1,)            in the dtype of the weight's scale, where inputs are rounded with a calibrated scale
    hessian      (in, in)        float32, sum over tokens of x x^T divided by the number of tokens

A weight is reconstructed as (codes - zero_point) * scale, or as the codes' values * scale / divisor. A scale is rounded
to its stored dtype first and codes are computed from the rounded scale, so what is written is what was optimised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


ScaleType = Literal["float", "e4m3", "e8m0"]

LONGEST_PATTERN = 1024
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
    with one calibrated number, which is stored (NVFP4).
    """

    type: Literal["int", "float"]
    granularity: Literal["token", "group", "tensor"]
    group_size: int | None = None
    bits: int = 8
    scale_type: ScaleType = "float"

    @property
    def dynamic(self) -> bool:
        """Whether nothing about the inputs is stored."""
        return self.granularity != "tensor" and self.scale_type != "e4m3"

    @property
    def steps(self) -> float:
        """A scale is the largest |x| divided by this: half of the 255 steps of int8, as for weights, 448 or 6."""
        if self.type == "int":
            return 127.5
        return FP8_HIGHEST if self.bits == 8 else E2M1[-1]


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
        row = 32 * math.ceil(in_features * self.bits / 32) if self.inputs is None else self.bits * in_features
        zero = self.bits if out_features is None else 32 * math.ceil(out_features * self.bits / 32) / out_features
        per_group = scale_bits + (0 if self.symmetric else zero)
        stored = (row + per_group * self.groups(in_features)) / in_features
        return stored + _per_tensor(self.inputs, scale_bits, in_features, out_features)

    def decode(self, quantized: QuantizedTensor) -> torch.Tensor:
        """As `QuantizedTensor.dequantize`."""
        scale = quantized.scale if self.inputs is None else quantized.scale.float()
        codes = quantized.codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
        if quantized.zero_point is not None:
            codes = codes - quantized.zero_point.to(scale.dtype).unsqueeze(-1)
        return (codes * scale.unsqueeze(-1)).flatten(1)


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
        stored = 8.0 + _per_tensor(self.inputs, scale_bits, in_features, out_features)
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


Scheme = IntScheme | Fp8Scheme | BlockFloatScheme
"""A numeric layout: of the weight, and of the inputs where they are rounded too."""


def _per_tensor(inputs: InputScheme | None, scale_bits: int, in_features: int, out_features: int | None) -> float:
    """Bits per weight of the one scale of static inputs."""
    if inputs is None or inputs.dynamic or out_features is None:
        return 0.0
    return scale_bits / (in_features * out_features)


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
    """One quantised weight: codes (out, in), scale, zero_point (out, groups) int8 or None, divisor (1,) or None."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: Scheme
    divisor: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """The weight (out, in): in the scale's dtype where weights alone are quantised, else float32.

        Kernels for weight-only schemes decode to that dtype; those that multiply codes apply the scale in float32.
        Blocks of floats are bfloat16.
        """
        return self.scheme.decode(self)
