"""Which of compressed-tensors' layouts stores a scheme, and packing and unpacking through it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.formats import block_floats, byte_codes, e8m0, int_packed
from compress.formats.compressed_tensors import PACKED, format_of
from compress.formats.tensors import positive
from compress.types import BlockFloatScheme, InputScheme, IntScheme, QuantizedTensor, Scheme

PACKED_SUFFIX = ".weight_packed"
SCALE_SUFFIX = ".weight_scale"
INPUT_SCALE, INPUT_GLOBAL_SCALE = "input_scale", "input_global_scale"
PARTS = (
    "weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", block_floats.GLOBAL_SCALE,
    INPUT_SCALE, INPUT_GLOBAL_SCALE,
)  # fmt: skip
"""Local names of everything that a quantised linear may store in place of its weight."""


def input_scale_name(inputs: InputScheme) -> str:
    """The local name of what calibration stores of a linear's inputs."""
    return INPUT_GLOBAL_SCALE if inputs.scale_type == "e4m3" else INPUT_SCALE


def input_scale(stored: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """What calibration stored of a linear's inputs (1,). IntegrityError where it did not."""
    assert scheme.inputs is not None
    return positive(stored, input_scale_name(scheme.inputs)).clone()


def scales(stored: Mapping[str, Tensor]) -> Tensor:
    """The scales of a linear as numbers; powers of two are stored as their exponents."""
    scale = stored["weight_scale"]
    return e8m0.decode(scale) if scale.dtype == torch.uint8 else scale.float()


def pack(quantized: QuantizedTensor, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name; `input_scale` (1,) where its scheme's inputs are static."""
    scheme = quantized.scheme
    if isinstance(scheme, BlockFloatScheme):
        stored = block_floats.pack(quantized)
    else:
        stored = (int_packed if format_of(scheme) == PACKED else byte_codes).pack(quantized)
    if input_scale is None:
        return stored
    assert scheme.inputs is not None
    return {**stored, input_scale_name(scheme.inputs): input_scale}


def unpack(stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """The quantised weight of `pack`'s tensors.

    Raises:
        IntegrityError: a tensor is missing, or its shape or dtype contradicts the scheme.
    """
    if isinstance(scheme, BlockFloatScheme):
        return block_floats.unpack(stored, scheme)
    if isinstance(scheme, IntScheme) and format_of(scheme) == PACKED:
        return int_packed.unpack(stored, scheme)
    return byte_codes.unpack(stored, scheme)


def decoded_dtype(scheme: Scheme, scale: torch.dtype) -> torch.dtype:
    """The dtype that weights of this scheme are written in where nothing is packed; `scale`: of their scales."""
    return torch.bfloat16 if isinstance(scheme, BlockFloatScheme) else scale


def quantized_linears(names: Mapping[str, object]) -> list[str]:
    """The linears among stored tensors (by name) that are quantised: packed codes, or a weight with a scale."""
    packed = [name.removesuffix(PACKED_SUFFIX) for name in names if name.endswith(PACKED_SUFFIX)]
    scaled = [name.removesuffix(SCALE_SUFFIX) for name in names if name.endswith(SCALE_SUFFIX)]
    plain = [name for name in scaled if f"{name}.weight" in names and name + PACKED_SUFFIX not in names]
    return packed + plain
