"""One byte per weight, as compressed-tensors' `int-quantized` and `float-quantized` store it: codes and scale as is.

`weight` is (out, in), int8 or float8_e4m3fn. Where inputs are rounded by a calibrated scale, `input_scale` is stored
beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats.fp8 import E4M3
from compress.types import Fp8Scheme, IntScheme, QuantizedTensor, Scheme


def pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name: weight, weight_scale."""
    return {"weight": quantized.codes.contiguous(), "weight_scale": quantized.scale.contiguous()}


def unpack(stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Inverse of `pack`.

    Raises:
        IntegrityError: a tensor is missing, or its shape or dtype contradicts the scheme.
    """
    try:
        codes, scale = stored["weight"], stored["weight_scale"]
    except KeyError as missing:
        raise IntegrityError(f"quantised weight lacks {missing}", "run `compress verify` on the artifact") from None
    wanted = torch.int8 if isinstance(scheme, IntScheme) else E4M3
    if codes.dtype != wanted or codes.ndim != 2:
        raise IntegrityError(
            f"weight is {codes.dtype} {tuple(codes.shape)}, the scheme needs {wanted} (out, in)",
            "run `compress verify` on the artifact",
        )
    out, width = codes.shape
    shape = scheme.scale_shape(out, width) if isinstance(scheme, Fp8Scheme) else (out, scheme.groups(width))
    if tuple(scale.shape) != shape or not scale.is_floating_point():
        raise IntegrityError(
            f"weight_scale is {scale.dtype} {tuple(scale.shape)}, the scheme needs {shape}",
            "run `compress verify` on the artifact",
        )
    return QuantizedTensor(codes, scale, None, scheme)
