"""Blocks of floats: golden codes and scales, and the package makes and reads the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from compress.errors import IntegrityError
from compress.formats import e8m0, fp4, layouts
from compress.formats.compressed_tensors import format_of
from compress.quantization import block_floats
from compress.schemes import FIXED_SCHEMES
from compress.types import BlockFloatScheme, QuantizedTensor

# value -> code, from the format's definition: sign, 2 bits of exponent (bias 1), 1 of mantissa.
GOLDEN = [
    (0.0, 0), (0.5, 1), (1.0, 2), (1.5, 3), (2.0, 4), (3.0, 5), (4.0, 6), (6.0, 7),
    (-0.5, 9), (-3.0, 13), (-6.0, 15),
    (0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6),  # halfway: to the even mantissa
    (0.26, 1), (2.51, 5), (5.01, 7), (-5.0, 14), (7.0, 7), (-1e30, 15), (float("inf"), 7),
]  # fmt: skip
SCHEMES = {name: s for name, s in FIXED_SCHEMES.items() if isinstance(s, BlockFloatScheme)}


def made(scheme: BlockFloatScheme, shape: tuple[int, int] = (24, 96), search: bool = True) -> QuantizedTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, shape[1])
    return block_floats.transform(weight, scheme, search)


def package_scheme(name: str, scheme: BlockFloatScheme) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], format=format_of(scheme), **PRESET_SCHEMES[name])


def test_golden_codes() -> None:
    values = torch.tensor([[value for value, _ in GOLDEN]])
    codes = fp4.encode(values)
    assert codes.dtype == torch.uint8
    assert codes[0].tolist() == [code for _, code in GOLDEN]


def test_the_even_column_is_in_the_low_half() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    packed = fp4.pack(codes)
    assert packed.tolist() == [[0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]]
    assert torch.equal(fp4.unpack(packed), codes)


def test_golden_scales_of_powers_of_two() -> None:
    values = torch.tensor([0.0, 1.0, 1.0001, 0.75, 0.5, 2.0**-127, 3.0, 2.0**127])
    assert e8m0.covering(values).tolist() == [127, 127, 128, 127, 126, 0, 129, 254]
    assert e8m0.decode(torch.tensor([127, 128, 126, 0, 254], dtype=torch.uint8)).tolist() == [
        1.0, 2.0, 0.5, 2.0**-127, 2.0**127,
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 32), (24, 96)])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_makes_and_reads_the_same_bytes(name: str, search: bool, shape: tuple[int, int]) -> None:
    scheme = SCHEMES[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 1, shape[1])
    ours = block_floats.transform(weight, scheme, search)
    stored, theirs = layouts.pack(ours), package_scheme(name, scheme)
    package = BaseCompressor.get_value_from_registry(format_of(scheme))
    assert torch.equal(package.decompress(dict(stored), theirs)["weight"], ours.dequantize())
    given = {"weight": weight, "weight_scale": e8m0.decode(ours.scale)}
    if ours.divisor is not None:
        given |= {"weight_scale": ours.scale.float(), "weight_global_scale": ours.divisor}
    again = package.compress(given, theirs)
    assert set(again) == set(stored)
    for part, tensor in stored.items():
        assert torch.equal(again[part].view(torch.uint8), tensor.view(torch.uint8)), part
    unpacked = layouts.unpack(stored, scheme)
    assert torch.equal(unpacked.codes.view(torch.uint8), ours.codes.view(torch.uint8))
    assert torch.equal(unpacked.dequantize(), ours.dequantize())


def test_any_divisor_decodes_as_the_package_does() -> None:
    """Ours are powers of two; those of other tools are not, and their weights are rounded to bfloat16."""
    scheme = SCHEMES["NVFP4A16"]
    stored = {**layouts.pack(made(scheme)), "weight_global_scale": torch.tensor([2688 / 3.7])}
    package = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    expected = package.decompress(dict(stored), package_scheme("NVFP4A16", scheme))["weight"]
    assert torch.equal(layouts.unpack(stored, scheme).dequantize(), expected)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("NVFP4", {"weight_packed": None}, "lacks 'weight_packed'"),
        ("NVFP4", {"weight_scale": None}, "lacks 'weight_scale'"),
        ("NVFP4", {"weight_global_scale": None}, "lacks 'weight_global_scale'"),
        ("NVFP4", {"weight_global_scale": torch.zeros(1)}, "weight_global_scale is not one positive number"),
        ("NVFP4", {"weight_global_scale": torch.tensor([torch.inf])}, "weight_global_scale is not one positive number"),
        ("NVFP4", {"weight_packed": torch.zeros(24, 48, dtype=torch.int8)}, "torch.uint8"),
        ("NVFP4", {"weight_packed": torch.zeros(24, 40, dtype=torch.uint8)}, r"the scheme needs .* \(24, 5\)"),
        ("NVFP4", {"weight_scale": torch.zeros(24, 6, dtype=torch.uint8)}, "weight_scale is torch.uint8"),
        (
            "MXFP4A16",
            {"weight_scale": torch.zeros(24, 6, dtype=torch.uint8)},
            r"the scheme needs torch.uint8 \(24, 3\)",
        ),
        ("MXFP8", {"weight": torch.zeros(24, 96)}, "float8_e4m3fn"),
    ],
)
def test_contradictions_are_refused(name: str, change: dict[str, Any], said: str) -> None:
    scheme = SCHEMES[name]
    stored = {part: t for part, t in {**layouts.pack(made(scheme)), **change}.items() if t is not None}
    with pytest.raises(IntegrityError, match=said):
        layouts.unpack(stored, scheme)


def test_what_is_stored_of_inputs_is_named_by_their_scheme() -> None:
    number = torch.tensor([0.5])
    assert layouts.pack(made(SCHEMES["NVFP4"]), number)["input_global_scale"] is number
