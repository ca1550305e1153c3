"""FP8 E4M3: golden bytes, saturation, and the layout of tiles."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from compress.formats import byte_codes, fp8
from compress.quantization import fp8 as method
from compress.schemes import FIXED_SCHEMES
from compress.types import Fp8Scheme, QuantizedTensor

# value -> byte, from the format's definition: sign, 4 bits of exponent (bias 7), 3 of mantissa.
GOLDEN = [
    (0.0, 0x00),
    (-0.0, 0x80),
    (2.0**-9, 0x01),  # the smallest subnormal
    (7 * 2.0**-9, 0x07),
    (2.0**-6, 0x08),  # the smallest normal
    (1.0, 0x38),
    (-1.0, 0xB8),
    (1.125, 0x39),
    (1.0625, 0x38),  # halfway: to the even mantissa
    (1.1875, 0x3A),
    (240.0, 0x77),
    (448.0, 0x7E),
    (-448.0, 0xFE),
    (449.0, 0x7E),  # saturates; 0x7F is NaN
    (1e30, 0x7E),
    (-float("inf"), 0xFE),
]
SCHEMES = [scheme for scheme in FIXED_SCHEMES.values() if isinstance(scheme, Fp8Scheme)]


def test_golden_bytes() -> None:
    codes = fp8.encode(torch.tensor([value for value, _ in GOLDEN]))
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.view(torch.uint8).tolist() == [byte for _, byte in GOLDEN]


def test_every_code_encodes_to_itself() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3)
    finite = codes[~torch.isnan(codes.float())]
    assert len(finite) == 254
    assert torch.equal(fp8.encode(finite.float()).view(torch.uint8), finite.view(torch.uint8))


def args(scheme: Fp8Scheme) -> QuantizationScheme:
    strategy = {"tensor": "tensor", "channel": "channel", "tile": "block"}[scheme.granularity]
    tile = {"block_structure": [128, 128]} if strategy == "block" else {}
    weights = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True, **tile)
    return QuantizationScheme(targets=["Linear"], weights=weights, format="float-quantized")


@pytest.mark.parametrize("shape", [(8, 128), (128, 256), (200, 384)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_the_package_makes_and_reads_the_same_bytes(scheme: Fp8Scheme, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, shape[1])
    ours = method.transform(weight, scheme, torch.float32)
    stored = byte_codes.pack(ours)
    assert tuple(stored["weight_scale"].shape) == scheme.scale_shape(*shape)
    package = BaseCompressor.get_value_from_registry("float-quantized")
    theirs = package.compress({"weight": weight, "weight_scale": ours.scale}, args(scheme))
    assert torch.equal(theirs["weight"].view(torch.uint8), stored["weight"].view(torch.uint8))
    assert torch.equal(package.decompress(dict(stored), args(scheme))["weight"], ours.dequantize())
    again = byte_codes.unpack(stored, scheme)
    assert torch.equal(again.dequantize(), ours.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_the_error_is_that_of_three_bits_of_mantissa(scheme: Fp8Scheme, dtype: torch.dtype) -> None:
    weight = torch.randn(130, 256, generator=torch.Generator().manual_seed(1))
    found = method.transform(weight, scheme, dtype)
    assert found.scale.dtype == dtype
    steps = (found.dequantize() - weight).abs() / weight.abs().clamp(min=weight.abs().amax() * 2.0**-13)
    assert float(steps.max()) <= 2.0**-4 + 2.0**-8, "half a step, and the rounding of the largest value's scale"
    assert float(steps.max()) > 0.9 * 2.0**-4


def test_a_shared_range_is_taken_instead_of_the_weights_own() -> None:
    weight, scheme = torch.randn(4, 128), FIXED_SCHEMES["FP8_STATIC"]
    assert isinstance(scheme, Fp8Scheme)
    assert float(method.transform(weight, scheme, torch.float32, highest=448.0).scale) == 1.0


@pytest.mark.parametrize("weight", [torch.zeros(3, 128), torch.full((3, 128), 3e38)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_extremes_stay_finite(scheme: Fp8Scheme, weight: torch.Tensor) -> None:
    found: QuantizedTensor = method.transform(weight, scheme, torch.float32)
    torch.testing.assert_close(found.dequantize(), weight, rtol=0.01, atol=0)
