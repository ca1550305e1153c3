"""Blocks of floats as compressed-tensors' `nvfp4-pack-quantized`, `mxfp4-pack-quantized` and `mxfp8-quantized` store
them.

4-bit codes are packed in pairs (`weight_packed`, uint8), 8-bit ones lie as they are (`weight`). Block scales are FP8
for NVFP4, which has a float32 divisor besides (`weight_global_scale`), and E8M0 bytes for the microscaling formats.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats import fp4
from compress.formats.fp8 import E4M3
from compress.types import BlockFloatScheme, QuantizedTensor

GLOBAL_SCALE = "weight_global_scale"
_HINT = "run `compress verify` on the artifact"


def codes_name(scheme: BlockFloatScheme) -> str:
    """The local name of the stored codes."""
    return "weight_packed" if scheme.bits == 4 else "weight"


def scale_dtype(scheme: BlockFloatScheme) -> torch.dtype:
    """What block scales are stored as."""
    return E4M3 if scheme.scale_type == "e4m3" else torch.uint8


def pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name."""
    scheme = quantized.scheme
    assert isinstance(scheme, BlockFloatScheme)
    codes = fp4.pack(quantized.codes) if scheme.bits == 4 else quantized.codes.contiguous()
    stored = {codes_name(scheme): codes, "weight_scale": quantized.scale.contiguous()}
    return stored if quantized.divisor is None else {**stored, GLOBAL_SCALE: quantized.divisor}


def unpack(stored: Mapping[str, Tensor], scheme: BlockFloatScheme) -> QuantizedTensor:
    """Inverse of `pack`.

    Raises:
        IntegrityError: a tensor is missing, its shape or dtype contradicts the scheme, or the divisor is no number to
            divide by.
    """
    try:
        codes, scale = stored[codes_name(scheme)], stored["weight_scale"]
        divisor = stored[GLOBAL_SCALE] if scheme.spans_matrix else None
    except KeyError as missing:
        raise IntegrityError(f"quantised weight lacks {missing}", _HINT) from None
    wanted = torch.uint8 if scheme.bits == 4 else E4M3
    if codes.dtype != wanted or codes.ndim != 2:
        said = f"{codes_name(scheme)} is {codes.dtype} {tuple(codes.shape)}, the scheme needs {wanted} (out, in)"
        raise IntegrityError(said, _HINT)
    codes = fp4.unpack(codes) if scheme.bits == 4 else codes
    out, width = codes.shape
    shape, dtype = (out, scheme.groups(width)), scale_dtype(scheme)
    if not scheme.fits(width) or tuple(scale.shape) != shape or scale.dtype != dtype:
        said = f"weight_scale is {scale.dtype} {tuple(scale.shape)}, the scheme needs {dtype} {shape}"
        raise IntegrityError(said, _HINT)
    if divisor is not None and (divisor.numel() != 1 or not 0 < float(divisor) < float("inf")):
        raise IntegrityError(f"{GLOBAL_SCALE} is not one positive number", _HINT)
    return QuantizedTensor(codes, scale, None, scheme, None if divisor is None else divisor.float().reshape(1))
