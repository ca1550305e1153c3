"""Ternary weights as BitNet b1.58's checkpoints store them, and transformers' `bitnet` integration reads them.

weight (out / 4, in) uint8, four rows to a byte: bits 2 i and 2 i + 1 of row r hold the code of row i * out / 4 + r,
plus one; weight_scale (1,), what codes are multiplied by. Layers round their inputs to 8 bits (arXiv:2402.17764,
section 2). transformers multiplies what a layer gives, its bias with it, by the scale of the weight, so a layer with a
bias is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats.names import Refusal
from compress.formats.tensors import HINT, fetch
from compress.types import IntScheme, QuantizedTensor, Scheme, ternary_scheme

QUANT_METHOD = "bitnet"
PARTS = ("weight", "weight_scale")
PER_BYTE = 4


def shape_refusal(scheme: Scheme, out: int, width: int) -> Refusal | None:
    """Why a weight (out, in) cannot be packed; None if it can."""
    if out % PER_BYTE:
        return Refusal(f"bitnet packs {PER_BYTE} rows to a byte, which do not divide {out}", "leave `format` out")
    return None


def value_refusal(quantized: QuantizedTensor) -> Refusal | None:
    """Why these very codes cannot be stored; None if they are ternary with one scale."""
    if bool((quantized.codes.abs() > 1).any()) or bool((quantized.scale != quantized.scale.flatten()[0]).any()):
        return Refusal("bitnet holds -1, 0 and 1 times one scale", "use --method ternary")
    return None


def pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name; `value_refusal` has none for it."""
    if value_refusal(quantized) is not None:
        raise IntegrityError("these codes are not ternary with one scale", "please report this with the recipe")
    strips = (quantized.codes + 1).to(torch.uint8).unflatten(0, (PER_BYTE, -1))
    packed = strips[0] | strips[1] << 2 | strips[2] << 4 | strips[3] << 6
    return {"weight": packed.contiguous(), "weight_scale": quantized.scale.flatten()[:1].clone()}


def unpack(stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Inverse of `pack`; every row repeats the scale.

    Raises:
        IntegrityError: a tensor is missing or of another shape or dtype, or a code is none of the three.
    """
    assert isinstance(scheme, IntScheme)
    packed, scale = fetch(stored, "weight", 2, dtype=torch.uint8), fetch(stored, "weight_scale", 1, (1,))
    codes = torch.cat([packed >> (2 * place) & 3 for place in range(PER_BYTE)])
    if bool((codes == 3).any()) or not scale.is_floating_point():
        raise IntegrityError("weight holds codes other than those of -1, 0 and 1, or its scale is no number", HINT)
    return QuantizedTensor(codes.to(torch.int8) - 1, scale.repeat(len(codes)).unsqueeze(1), None, scheme)


def quantization_config(schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config`: weights that are packed, and unpacked when they are loaded."""
    return {
        "quant_method": QUANT_METHOD,
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": sorted(ignored),
    }


def schemes(quantization: Mapping[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
    """The scheme of each of `linears`. IntegrityError for the other class of layers, whose scale is the reciprocal."""
    found = (quantization.get("linear_class"), quantization.get("quantization_mode", "offline"))
    if found != ("autobitlinear", "offline") or quantization.get("use_rms_norm"):
        raise IntegrityError(
            f"bitnet of {found} cannot be read here", "autobitlinear, offline and without norms is read"
        )
    return dict.fromkeys(linears, ternary_scheme())
