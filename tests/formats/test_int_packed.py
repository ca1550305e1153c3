"""The bit layout against golden words and against the compressed-tensors package, which owns it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import (
    PackedQuantizationCompressor,
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats.compressed_tensors import quantization_config
from compress.formats.int_packed import pack, pack_bits, unpack, unpack_bits
from compress.types import IntScheme, QuantizedTensor
from tests.formats.packed import random_codes, random_weight, signed


def test_golden_words_of_4_bits() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(1, 16)
    assert pack_bits(codes, 4).tolist() == [signed([0x76543210, 0xFEDCBA98])]


def test_golden_words_of_3_bits() -> None:
    # 0..7 in three bits each is the byte sequence 88 c6 fa; a code may lie in two words.
    codes = torch.arange(-4, 4, dtype=torch.int8).repeat(2, 4)
    words = signed([0x88FAC688, 0xC688FAC6, 0xFAC688FA])
    assert pack_bits(codes, 3).tolist() == [words, words]


def test_golden_words_of_a_ragged_row() -> None:
    # Eleven 3-bit codes are 33 bits: the last one begins with the top bit of the first word.
    codes = torch.tensor([[-4, -4, -4, -4, -4, -4, -4, -4, -4, -4, 3]], dtype=torch.int8)
    assert pack_bits(codes, 3).tolist() == [signed([0xC0000000, 0x00000001])]


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 5), width=st.integers(1, 140), seed=st.integers(0, 2**30))
def test_words_are_those_of_compressed_tensors(bits: int, rows: int, width: int, seed: int) -> None:
    codes = random_codes(bits, rows, width, seed=seed)
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_bits(words, bits, width), codes)
    assert torch.equal(unpack_from_int32(words, bits, torch.Size(codes.shape)), codes)


@settings(max_examples=100, deadline=None)
@given(
    bits=st.integers(2, 8),
    out=st.integers(1, 40),
    groups=st.integers(1, 5),
    size=st.integers(1, 40),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_a_linear_is_read_as_compressed_tensors_reads_it(
    bits: int, out: int, groups: int, size: int, symmetric: bool, seed: int
) -> None:
    weight = random_weight(bits, out, groups, size, symmetric, seed)
    stored = pack(weight)
    (group,) = quantization_config({"linear": weight.scheme}, [])["config_groups"].values()
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"], format=group["format"])
    decoded = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert torch.equal(decoded, weight.dequantize())
    again = unpack(stored, weight.scheme)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert (again.zero_point is None) == symmetric
    if weight.zero_point is not None:
        assert again.zero_point is not None
        assert torch.equal(again.zero_point, weight.zero_point)
        packed_zero = stored["weight_zero_point"]
        assert torch.equal(packed_zero, pack_to_int32(weight.zero_point, bits, packed_dim=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantising_rounds_as_compressed_tensors_does(dtype: torch.dtype, symmetric: bool) -> None:
    weight = random_weight(5, 33, 3, 32, symmetric)
    weight = QuantizedTensor(weight.codes, weight.scale.to(dtype), weight.zero_point, weight.scheme)
    (group,) = quantization_config({"linear": weight.scheme}, [])["config_groups"].values()
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"], format=group["format"])
    decoded = PackedQuantizationCompressor.decompress(pack(weight), scheme)["weight"]
    assert decoded.dtype == weight.dequantize().dtype == dtype
    assert torch.equal(decoded, weight.dequantize())


def test_one_group_over_the_whole_row() -> None:
    weight = random_weight(4, 6, 1, 24, symmetric=False)
    per_channel = QuantizedTensor(weight.codes, weight.scale, weight.zero_point, IntScheme(4, None, False))
    again = unpack(pack(per_channel), per_channel.scheme)
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda t: t.pop("weight_packed"), "lacks 'weight_packed'"),
        (lambda t: t.pop("weight_scale"), "lacks 'weight_scale'"),
        (lambda t: t.pop("weight_shape"), "lacks 'weight_shape'"),
        (lambda t: t.pop("weight_zero_point"), "lacks 'weight_zero_point'"),
        (lambda t: t.update(weight_packed=t["weight_packed"][:, :-1]), "weight_packed is"),
        (lambda t: t.update(weight_packed=t["weight_packed"].to(torch.int64)), "weight_packed is"),
        (lambda t: t.update(weight_scale=t["weight_scale"][:, :1]), "weight_scale is"),
        (lambda t: t.update(weight_zero_point=t["weight_zero_point"][:1]), "weight_zero_point is"),
        (lambda t: t.update(weight_shape=torch.tensor([32, 65])), "weight_shape is"),
        (lambda t: t.update(weight_shape=torch.tensor([32, 128])), "weight_packed is"),
        (lambda t: t.update(weight_shape=torch.tensor([32])), "weight_shape is"),
        (lambda t: t.update(weight_shape=torch.tensor([-1, 64])), "weight_shape is"),
    ],
)
def test_stored_tensors_that_do_not_fit_are_refused(spoil: Callable[[dict[str, Tensor]], object], match: str) -> None:
    weight = random_weight(4, 32, 2, 32, symmetric=False)
    stored = pack(weight)
    spoil(stored)
    with pytest.raises(IntegrityError, match=match):
        unpack(stored, weight.scheme)
