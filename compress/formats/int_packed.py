"""Integer weights as compressed-tensors' `pack-quantized` stores them: a dense bit stream in int32 words.

An unsigned code q + 2^(b-1) occupies b bits; element i of a row starts at bit i*b and may cross a word. Weights are
packed along the input dimension, zero points along the output dimension. Golden words are in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.types import IntScheme, QuantizedTensor

SLICE_CODES = 1 << 21  # codes worked on at a time: packing widens each to eight bytes


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs signed codes (rows, n) int8 into int32 words (rows, ceil(n * bits / 32)), little-endian, without gaps."""
    return torch.cat([_pack_slice(part, bits) for part in codes.split(_rows_per_slice(codes.shape[1]))])


def unpack_bits(words: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_bits`: int32 words (rows, ceil(n * bits / 32)) to signed codes (rows, n) int8."""
    return torch.cat([_unpack_slice(part, bits, n) for part in words.split(_rows_per_slice(n))])


def _rows_per_slice(n: int) -> int:
    return max(1, SLICE_CODES // max(n, 1))


def _pack_slice(codes: Tensor, bits: int) -> Tensor:
    rows, n = codes.shape
    words = -(-n * bits // 32)
    unsigned = codes.to(torch.int64) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -n % 32)).reshape(rows, -1, 32)
    packed = torch.zeros(rows, unsigned.shape[1], bits, dtype=torch.int64)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        packed[..., word] |= (unsigned[..., i] << offset) & 0xFFFFFFFF
        if offset + bits > 32:
            packed[..., word + 1] |= unsigned[..., i] >> (32 - offset)
    return packed.reshape(rows, -1)[:, :words].to(torch.int32).contiguous()


def _unpack_slice(words: Tensor, bits: int, n: int) -> Tensor:
    rows = words.shape[0]
    groups = -(-n // 32)
    stream = words.to(torch.int64) & 0xFFFFFFFF
    stream = torch.nn.functional.pad(stream, (0, groups * bits - words.shape[1])).reshape(rows, groups, bits)
    codes = torch.empty(rows, groups, 32, dtype=torch.int64)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = stream[..., word] >> offset
        if offset + bits > 32:
            value = value | (stream[..., word + 1] << (32 - offset))
        codes[..., i] = value & ((1 << bits) - 1)
    return (codes.reshape(rows, -1)[:, :n] - (1 << (bits - 1))).to(torch.int8)


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
    out, width = (int(n) for n in shape)
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
