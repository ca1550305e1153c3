"""Integer weights as compressed-tensors' `pack-quantized` stores them: a dense bit stream in int32 words.

An unsigned code q + 2^(b-1) occupies b bits; element i of a row starts at bit i*b and may cross a word. Weights are
packed along the input dimension, zero points along the output dimension. Golden words are in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import IntegrityError
from compress.types import IntScheme, QuantizedTensor

ROWS_AT_A_TIME = 256  # packing spells every bit as a byte for a moment


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs signed codes (rows, n) int8 into int32 words (rows, ceil(n * bits / 32)), little-endian, without gaps."""
    n = codes.shape[1]
    words = -(-n * bits // 32)
    packed = np.zeros((codes.shape[0], words * 4), np.uint8)
    places = np.arange(bits, dtype=np.uint8)
    unsigned = (codes.numpy().astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    for start in range(0, len(unsigned), ROWS_AT_A_TIME):
        part = unsigned[start : start + ROWS_AT_A_TIME]
        if 8 % bits == 0 and n * bits % 8 == 0:  # whole codes in whole bytes: far quicker than bit by bit
            packed[start : start + len(part), : n * bits // 8] = _bytes(part, bits)
            continue
        stream = (part[..., None] >> places & 1).reshape(len(part), n * bits)
        packed[start : start + len(part), : -(-n * bits // 8)] = np.packbits(stream, axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32, copy=False))


def _bytes(unsigned: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes (rows, n) of as many bits as divide a byte, side by side in bytes (rows, n * bits / 8)."""
    result = unsigned[:, :: 8 // bits].copy()
    for place in range(1, 8 // bits):
        result |= unsigned[:, place :: 8 // bits] << (place * bits)
    return result


def unpack_bits(words: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_bits`: int32 words (rows, ceil(n * bits / 32)) to signed codes (rows, n) int8."""
    stored = words.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    codes = np.empty((len(stored), n), np.int8)
    values = 1 << np.arange(bits, dtype=np.int16)
    for start in range(0, len(stored), ROWS_AT_A_TIME):
        part = stored[start : start + ROWS_AT_A_TIME]
        stream = np.unpackbits(part, axis=1, count=n * bits, bitorder="little").reshape(len(part), n, bits)
        codes[start : start + len(part)] = stream @ values - (1 << (bits - 1))
    return torch.from_numpy(codes)


def pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name: weight_packed, weight_scale, weight_shape, weight_zero_point."""
    scheme = quantized.scheme
    stored = {
        "weight_packed": pack_bits(quantized.codes, scheme.bits),
        "weight_scale": quantized.scale.contiguous(),
        "weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    if quantized.zero_point is not None:
        stored["weight_zero_point"] = pack_bits(quantized.zero_point.T, scheme.bits).T.contiguous()
    return stored


def decode_rows(stored: Mapping[str, Tensor], scheme: IntScheme, rows: Tensor) -> Tensor:
    """Some rows (n, in) of what `pack`'s tensors stand for, in the scale's dtype; no other row is decoded."""
    out, width = (int(extent) for extent in stored["weight_shape"])
    zero = None
    if not scheme.symmetric:
        zero = unpack_bits(stored["weight_zero_point"].T, scheme.bits, out).T[rows]
    codes = unpack_bits(stored["weight_packed"][rows], scheme.bits, width)
    return QuantizedTensor(codes, stored["weight_scale"][rows], zero, scheme).dequantize()


def unpack(stored: Mapping[str, Tensor], scheme: IntScheme) -> QuantizedTensor:
    """Inverse of `pack`.

    Raises:
        IntegrityError: a tensor is missing, or its shape or dtype contradicts `weight_shape` and the scheme.
    """
    try:
        packed, scale, shape = stored["weight_packed"], stored["weight_scale"], stored["weight_shape"]
        zero_words = None if scheme.symmetric else stored["weight_zero_point"]
    except KeyError as missing:
        raise IntegrityError(f"packed weight lacks {missing}", "run `compress verify` on the artifact") from None
    if shape.numel() != 2 or int(shape.min()) < 1 or not scheme.fits(int(shape.flatten()[1])):
        raise IntegrityError(
            f"weight_shape is {shape.flatten().tolist()}, which is no shape that the scheme fits",
            "run `compress verify` on the artifact",
        )
    out, width = (int(n) for n in shape.flatten())
    groups = scheme.groups(width)
    expected = {
        "weight_packed": (packed, torch.int32, (out, -(-width * scheme.bits // 32))),
        "weight_scale": (scale, scale.dtype, (out, groups)),
    }
    if zero_words is not None:
        expected["weight_zero_point"] = (zero_words, torch.int32, (-(-out * scheme.bits // 32), groups))
    for name, (tensor, dtype, size) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            raise IntegrityError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the scheme needs {dtype} {size}",
                "run `compress verify` on the artifact",
            )
    zero = None if zero_words is None else unpack_bits(zero_words.T, scheme.bits, out).T.contiguous()
    return QuantizedTensor(unpack_bits(packed, scheme.bits, width), scale, zero, scheme)
