"""Which of compressed-tensors' layouts stores a scheme, and packing and unpacking through it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compress.formats import byte_codes, int_packed
from compress.formats.compressed_tensors import PACKED, format_of
from compress.types import IntScheme, QuantizedTensor, Scheme

PACKED_SUFFIX = ".weight_packed"
SCALE_SUFFIX = ".weight_scale"
INPUT_SCALE = "input_scale"
PARTS = ("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", INPUT_SCALE)
"""Local names of everything that a quantised linear may store in place of its weight."""


def pack(quantized: QuantizedTensor, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name; `input_scale` (1,) where its scheme's inputs are static."""
    layout = int_packed if format_of(quantized.scheme) == PACKED else byte_codes
    stored = layout.pack(quantized)
    return stored if input_scale is None else {**stored, INPUT_SCALE: input_scale}


def unpack(stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """The quantised weight of `pack`'s tensors.

    Raises:
        IntegrityError: a tensor is missing, or its shape or dtype contradicts the scheme.
    """
    if isinstance(scheme, IntScheme) and format_of(scheme) == PACKED:
        return int_packed.unpack(stored, scheme)
    return byte_codes.unpack(stored, scheme)


def quantized_linears(names: Mapping[str, object]) -> list[str]:
    """The linears among stored tensors (by name) that are quantised: packed codes, or a weight with a scale."""
    packed = [name.removesuffix(PACKED_SUFFIX) for name in names if name.endswith(PACKED_SUFFIX)]
    scaled = [name.removesuffix(SCALE_SUFFIX) for name in names if name.endswith(SCALE_SUFFIX)]
    plain = [name for name in scaled if f"{name}.weight" in names and name + PACKED_SUFFIX not in names]
    return packed + plain
