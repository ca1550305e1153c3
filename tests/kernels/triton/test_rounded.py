"""Products with inputs rounded to 8 bits against float64 on what the formats' own rounding makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.formats.inputs import round_inputs
from compress.schemes import FIXED_SCHEMES
from compress.types import Fp8Scheme, InputScheme, IntScheme, QuantizedTensor, Scheme
from tests.kernels.triton.weights import inputs, is_close

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels.triton import available, rounded_linear, rounded_packing
from compress.kernels.triton.rounding import round_kernel

NAMES = ("W8A8", "W8A8_STATIC", "FP8_DYNAMIC", "FP8_STATIC", "FP8_BLOCK")
OF_FP8_CORES = 2e-3
"""Hopper's add FP8 products in about 14 bits; what is decoded to bfloat16, and the interpreter, add in float32."""


def lost(name: str, device: str) -> float:
    """What sums on the device may lose."""
    return OF_FP8_CORES if name.startswith("FP8") and available.multiplies_fp8(torch.device(device)) else 0.0


def quantized(rows: int, columns: int, scheme: Scheme) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows)
    if isinstance(scheme, IntScheme):
        codes = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
        return QuantizedTensor(codes, torch.rand(rows, 1, generator=generator) * 0.01 + 0.001, None, scheme)
    assert isinstance(scheme, Fp8Scheme)
    codes = torch.randn(rows, columns, generator=generator).mul_(40).to(torch.float8_e4m3fn)
    scale = torch.rand(scheme.scale_shape(rows, columns), generator=generator) * 0.01 + 0.001
    return QuantizedTensor(codes, scale, None, scheme)


def pack(weight: QuantizedTensor, device: str, bias: Tensor | None = None) -> rounded_packing.RoundedWeight:
    moved = QuantizedTensor(weight.codes.to(device), weight.scale.to(device), None, weight.scheme)
    assert weight.scheme.inputs is not None
    static = torch.tensor([0.02], device=device) if weight.scheme.inputs.granularity == "tensor" else None
    return rounded_packing.pack(moved, static, None if bias is None else bias.to(device))


def expected(weight: QuantizedTensor, x: Tensor) -> Tensor:
    assert weight.scheme.inputs is not None
    static = torch.tensor([0.02]) if weight.scheme.inputs.granularity == "tensor" else None
    rounded = round_inputs(x.float(), weight.scheme.inputs, static)
    return rounded.double() @ weight.dequantize().double().T


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_products_that_do_not_depend_on_company(name: str, device: str) -> None:
    packed, x = pack(quantized(150, 256, FIXED_SCHEMES[name]), device), inputs(70, 256, torch.float32).to(device)
    whole = rounded_linear.multiply(packed, x, same=True)
    for first, last in ((0, 1), (17, 20), (69, 70)):
        assert torch.equal(rounded_linear.multiply(packed, x[first:last], same=True), whole[first:last])


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_rounded_inputs(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "multiplies_fp8", lambda _: False)  # the strict bound holds on every device
    weight = quantized(150, 256, FIXED_SCHEMES[name])
    packed = pack(weight, device)
    for tokens, dtype in ((1, torch.float32), (19, torch.bfloat16)):
        x = inputs(tokens, 256, dtype)
        x[0] = 0
        assert is_close(rounded_linear.multiply(packed, x.to(device)), expected(weight, x)), (tokens, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_shapes(name: str, device: str) -> None:
    for rows, columns in ((1, 128), (129, 1152), (200, 640)):
        columns += 0 if name == "FP8_BLOCK" else 6
        weight, bias = quantized(rows, columns, FIXED_SCHEMES[name]), torch.linspace(-1, 1, rows)
        packed = pack(weight, device, bias)
        for tokens in (1, 2, 16, 17, 129, 200):
            for dtype in (torch.float32, torch.bfloat16):
                x = inputs(tokens, columns, dtype)
                wanted = expected(weight, x) + bias.double()
                assert is_close(rounded_linear.multiply(packed, x.to(device)), wanted, lost(name, device)), (
                    rows,
                    tokens,
                )


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK"])
def test_native_fp8_has_the_numbers_of_the_emulated_one(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = device == "cpu" or available.multiplies_fp8(torch.device(device))
    if not native:
        pytest.skip("this GPU multiplies no FP8")
    weight, x = quantized(40, 256, FIXED_SCHEMES[name]), inputs(5, 256, torch.float32)
    may_lose = lost(name, device)
    monkeypatch.setattr(available, "multiplies_fp8", lambda _: True)
    assert is_close(rounded_linear.multiply(pack(weight, device), x.to(device)), expected(weight, x), may_lose)


def test_fp8_codes_are_the_nearest_with_ties_to_even(device: str) -> None:
    finite = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    between = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, finite * 1.001, torch.tensor([1e9, 464.0, 2.0**-40])])
    values = torch.cat([between, -between]).float().to(device)
    codes = torch.empty(1, len(values), dtype=torch.uint8, device=device)
    one, scale = torch.ones(1, device=device), torch.empty(1, 1, device=device)
    span = 1 << (len(values) - 1).bit_length()
    round_kernel[(1, 1)](values, one, codes, scale, len(values), len(values), STEPS=448.0, FP8=True, SPAN=span)
    wanted = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(codes[0].cpu(), wanted.cpu())


def test_what_does_not_fit_is_refused(device: str) -> None:
    for other in (IntScheme(4, 128), IntScheme(8, 128, True, InputScheme("int", "token"))):
        assert "no product of 8-bit codes" in (rounded_packing.obstacle(other, 256) or "")
    assert "together" in (rounded_packing.obstacle(Fp8Scheme("tile", InputScheme("float", "token")), 256) or "")
    assert [name for name in NAMES if rounded_packing.obstacle(FIXED_SCHEMES[name], 256)] == []
    weight = quantized(8, 64, FIXED_SCHEMES["W8A8_STATIC"])
    with pytest.raises(ValueError, match="need their scale"):
        rounded_packing.pack(weight)
    with pytest.raises(ValueError, match="do not fit"):
        rounded_linear.multiply(pack(weight, device), torch.zeros(1, 65, device=device))
