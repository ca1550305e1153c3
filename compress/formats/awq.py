"""4-bit weights as AutoAWQ's `gemm` kernels read them: packed along the outputs, in an order of their own.

qweight (in, out / 8) int32; qzeros (groups, out / 8) int32; scales (groups, out) float16. Nibble i of word c belongs to
output 8 c + NIBBLES[i]. Codes and zero points are unsigned; a symmetric weight is one whose zero points are all 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats.names import Refusal
from compress.formats.tensors import Layout, exact, fetch
from compress.types import IntScheme, QuantizedTensor, Scheme

QUANT_METHOD = "awq"
SCALE_DTYPE = torch.float16
PARTS = ("qweight", "qzeros", "scales")
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD = 8
_MIDDLE = 8


def shape_refusal(scheme: Scheme, out: int, width: int) -> Refusal | None:
    """Why a weight (out, in) cannot be packed; None if it can."""
    if out % PER_WORD:
        return Refusal(f"awq packs {PER_WORD} outputs to a word, which do not divide {out}", "use compressed-tensors")
    return None


def layout(scheme: Scheme, out: int, width: int) -> Layout:
    """Shape and dtype of everything that a linear stores."""
    groups = _integers(scheme).groups(width)
    return {
        "qweight": ((width, out // PER_WORD), torch.int32),
        "qzeros": ((groups, out // PER_WORD), torch.int32),
        "scales": ((groups, out), SCALE_DTYPE),
    }


def pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name."""
    zero = quantized.zero_point
    if zero is None:
        zero = torch.zeros(quantized.scale.shape, dtype=torch.int8)
    return {
        "qweight": pack_columns(quantized.codes.T),
        "qzeros": pack_columns(zero.T),
        "scales": exact(quantized.scale, SCALE_DTYPE).T.contiguous(),
    }


def unpack(stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Inverse of `pack`; the scheme is asymmetric, because zero points are stored.

    Raises:
        IntegrityError: a tensor is missing, or its shape or dtype contradicts the scheme.
    """
    integers = _integers(scheme)
    width, words = fetch(stored, "qweight", 2).shape
    qweight, qzeros, scales = (
        fetch(stored, name, 2, *rule) for name, rule in layout(integers, words * PER_WORD, width).items()
    )
    codes, zero = unpack_columns(qweight).T.contiguous(), unpack_columns(qzeros).T.contiguous()
    return QuantizedTensor(codes, scales.T.contiguous(), zero, integers)


def pack_columns(codes: Tensor) -> Tensor:
    """Signed 4-bit codes (rows, n) int8 into int32 words (rows, n / 8)."""
    unsigned = (codes.contiguous().numpy() + _MIDDLE).astype(np.uint32).reshape(len(codes), -1, PER_WORD)
    words = np.zeros(unsigned.shape[:2], np.uint32)
    for place, column in enumerate(NIBBLES):
        words |= unsigned[..., column] << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32))


def unpack_columns(words: Tensor) -> Tensor:
    """Inverse of `pack_columns`."""
    packed = words.contiguous().numpy().view(np.uint32)
    codes = np.empty((*packed.shape, PER_WORD), np.int8)
    for place, column in enumerate(NIBBLES):
        codes[..., column] = (packed >> np.uint32(4 * place) & 15).astype(np.int8) - _MIDDLE
    return torch.from_numpy(codes.reshape(len(packed), -1))


def quantization_config(schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint; `config_refusal` has none for these schemes."""
    (size,) = {scheme.group_size for scheme in schemes.values()}
    return {
        "quant_method": QUANT_METHOD,
        "bits": 4,
        "group_size": -1 if size is None else size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": sorted(ignored),
    }


def config_refusal(schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> Refusal | None:
    """Why one config cannot say all this: AWQ has one group size, and leaves linears out by parts of their names."""
    if len(sizes := {scheme.group_size for scheme in schemes.values()}) > 1:
        said = " and ".join(sorted("channel" if size is None else str(size) for size in sizes))
        return Refusal(
            f"awq has one group size for all linears, and these have {said}", "use gptq or compressed-tensors"
        )
    for name in ignored:
        if hit := next((linear for linear in schemes if name in linear), None):
            said = f"awq would leave out {hit} with {name}, because it matches parts of names"
            return Refusal(said, "use compressed-tensors")
    return None


def schemes(quantization: Mapping[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
    """The scheme of each of `linears`. IntegrityError where the config is not of 4 bits in the gemm layout."""
    version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
    bits, size = quantization.get("bits"), quantization.get("group_size")
    if version != "gemm" or bits != 4 or not isinstance(size, int) or not (size == -1 or size > 0):
        raise IntegrityError(
            f"awq with version {version!r}, bits {bits!r}, group_size {size!r} cannot be read here",
            "4 bits in the gemm layout are read",
        )
    return dict.fromkeys(linears, IntScheme(4, None if size == -1 else size, symmetric=False))


def _integers(scheme: Scheme) -> IntScheme:
    assert isinstance(scheme, IntScheme)
    return scheme
