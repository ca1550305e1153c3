"""Products with weights of FP8, FP4 and normal floats against float64, and inputs as formats round them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.formats import fp8
from compress.formats.inputs import round_inputs
from compress.kernels import packed_linear
from compress.kernels.cpu import _native
from compress.runtime.native_weights import float_weight
from compress.schemes import FIXED_SCHEMES
from compress.types import (
    Fp8Scheme,
    InputScheme,
    IntScheme,
    NestedScales,
    NormalFloatScheme,
    QuantizedTensor,
)

FLOATS = {name: scheme for name, scheme in FIXED_SCHEMES.items() if not isinstance(scheme, IntScheme)}
KINDS = ("FP8_DYNAMIC", "FP8_STATIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16", "NF4")  # of weights
TOKENS = (1, 2, 3, 9, 33)
SHAPES = ((37, 256), (70, 128), (16, 384))
EXACT = 4e-6  # largest error over the outputs' root mean square


def weight(name: str, rows: int, columns: int) -> QuantizedTensor:
    """Random codes over their whole range, and scales of every binade that a model has."""
    scheme, generator = FLOATS[name], torch.Generator().manual_seed(rows)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    if isinstance(scheme, Fp8Scheme):
        codes = fp8.encode(torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 2.5, columns))
        return QuantizedTensor(codes, uniform(*scheme.scale_shape(rows, columns)).bfloat16() + 0.001, None, scheme)
    groups = scheme.groups(columns)
    if isinstance(scheme, NormalFloatScheme):
        table = torch.linspace(-1, 1, 256)
        ranges = uniform(-(-rows * groups // 256)) + 0.5
        nested = NestedScales(table, ranges, torch.tensor([0.03]), torch.bfloat16)
        scale = torch.randint(0, 256, (rows, groups), generator=generator, dtype=torch.uint8)
        codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
        return QuantizedTensor(codes, scale, None, scheme, nested=nested)
    if scheme.bits == 4:
        codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    else:
        codes = fp8.encode(torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 2.5, columns))
    if scheme.scale_type == "e8m0":
        return QuantizedTensor(codes, (uniform(rows, groups) * 14 + 116).to(torch.uint8), None, scheme)
    return QuantizedTensor(codes, fp8.encode(uniform(rows, groups) * 448), None, scheme, torch.tensor([773.0]))


def packed(quantized: QuantizedTensor, **settings: Any) -> Any:
    return packed_linear.pack_floats(float_weight(quantized), threads=1, **settings)


def inputs(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


@pytest.mark.parametrize("name", KINDS)
def test_products_are_those_of_the_format(name: str, isa: str) -> None:
    for rows, columns in SHAPES:
        quantized = weight(name, rows, columns)
        bias = inputs(1, rows)[0]
        linear = packed(quantized, bias=bias)
        for tokens in TOKENS:
            x = inputs(tokens, columns)
            expected = x.double() @ quantized.dequantize().double().T + bias.double()
            assert error(packed_linear.multiply(linear, x, threads=1), expected) < EXACT


@pytest.mark.parametrize("name", KINDS)
def test_weights_have_the_values_of_the_format(name: str, isa: str) -> None:
    """One product per output, so that no sum rounds: a row alone and several together."""
    quantized = weight(name, 37, 128)
    linear, eye = packed(quantized), torch.eye(128)
    expected = quantized.dequantize().float().T
    assert torch.equal(packed_linear.multiply(linear, eye, threads=1), expected)
    alone = torch.cat([packed_linear.multiply(linear, row.unsqueeze(0), threads=1) for row in eye])
    assert torch.equal(alone, expected)


@pytest.mark.parametrize(
    ("name", "columns"),
    [("FP8_STATIC", 33), ("FP8_DYNAMIC", 100), ("NVFP4A16", 16), ("NVFP4A16", 80), ("MXFP4A16", 96)],
)
def test_widths_that_are_no_multiple_of_a_block(name: str, columns: int, isa: str) -> None:
    quantized = weight(name, 21, columns)
    linear = packed(quantized)
    for tokens in (1, 5):
        x = inputs(tokens, columns)
        expected = x.double() @ quantized.dequantize().double().T
        assert error(packed_linear.multiply(linear, x, threads=1), expected) < EXACT


@pytest.mark.parametrize("name", ["FP8_BLOCK", "NVFP4A16", "MXFP8A16"])
def test_an_output_depends_on_no_other_token_and_on_no_thread(name: str, isa: str) -> None:
    linear, x = packed(weight(name, 200, 256)), inputs(40, 256)
    alone = torch.cat([packed_linear.multiply(linear, row.unsqueeze(0), threads=1) for row in x])
    for size in (2, 7, 40):
        parts = [packed_linear.multiply(linear, part, threads=3) for part in x.split(size)]
        assert torch.equal(torch.cat(parts), alone)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [64, 127, 200])
@pytest.mark.parametrize("name", KINDS)
def test_prefill_sizes(name: str, tokens: int, isa: str) -> None:
    quantized, x = weight(name, 131, 1024), inputs(tokens, 1024)
    expected = x.double() @ quantized.dequantize().double().T
    assert error(packed_linear.multiply(packed(quantized), x, threads=2), expected) < EXACT


WAYS = {
    "fp8 token": (InputScheme("float", "token"), 0.0),
    "fp8 group": (InputScheme("float", "group", 128), 0.0),
    "fp8 static": (InputScheme("float", "tensor"), 0.003),
    "nvfp4": (InputScheme("float", "group", 16, 4, "e4m3"), 713.0),
    "mxfp4": (InputScheme("float", "group", 32, 4, "e8m0"), 0.0),
    "mxfp8": (InputScheme("float", "group", 32, 8, "e8m0"), 0.0),
    "int8 token": (InputScheme("int", "token"), 0.0),
    "int8 static": (InputScheme("int", "tensor"), 0.02),
    "narrow": (InputScheme("int", "token", narrow=True), 0.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_inputs_are_rounded_as_the_reference_rounds_them(way: str, isa: str) -> None:
    """A weight of ones on the diagonal gives them back, digit for digit."""
    scheme, stored = WAYS[way]
    x = inputs(40, 256)
    x *= torch.logspace(-30, 3, 40).unsqueeze(1)
    x[:, ::7] *= 1e-3
    x[3], x[4, :128], x[5, 1] = 0, 0, 448.0
    x[6] = torch.linspace(-500, 500, 256)
    scale = torch.tensor([stored]) if stored else None
    expected = round_inputs(x, scheme, scale)
    words = torch.eye(256, dtype=torch.uint8).mul(0x38).view(torch.int32)  # 1 in E4M3
    ones = packed_linear.FloatWeight(words, 256, None, torch.ones(256, 1), "float32", 256)
    linear = packed_linear.pack_floats(ones, scheme, threads=1, input_scale=stored)
    for part in (slice(0, 40), slice(7, 8)):
        assert torch.equal(packed_linear.multiply(linear, x[part], threads=1), expected[part])
    for poison in (torch.nan, torch.inf):
        x[0, 3] = poison
        found = packed_linear.multiply(linear, x[:1], threads=1)
        assert not found[0, 3].isfinite()


def test_codes_that_are_no_numbers_are_refused() -> None:
    quantized = weight("FP8_DYNAMIC", 16, 64)
    packed(quantized)
    quantized.codes.view(torch.uint8)[3, 17] = 0xFF
    with pytest.raises(ValueError, match="NaN"):
        packed(quantized)


def arguments() -> dict[str, Any]:
    return {
        "packed": torch.zeros(16, 8, dtype=torch.int32),
        "scale": torch.ones(16, 4, dtype=torch.uint8),
        "columns": 64,
        "group_size": 16,
        "table": torch.zeros(16),
        "scale_type": "e4m3",
        "value_type": "bfloat16",
        "factor": 1.0,
        "divisor": 2.0,
        "bias": None,
        "threads": 1,
        "inputs": ("none", 0, 0.0),
    }


BAD: list[tuple[str, Any]] = [
    ("packed", torch.zeros(16, 9, dtype=torch.int32)),
    ("packed", torch.zeros(16, 8)),
    ("scale", torch.ones(16, 4)),
    ("scale", torch.ones(16, 5, dtype=torch.uint8)),
    ("scale_type", "float32"),
    ("scale_type", "e5m2"),
    ("value_type", "float64"),
    ("columns", 2**62),
    ("columns", 0),
    ("group_size", 8),
    ("group_size", -16),
    ("table", torch.zeros(15)),
    ("table", None),
    ("factor", 0.0),
    ("divisor", float("nan")),
    ("threads", 0),
    ("inputs", ("fp5", 0, 0.0)),
    ("inputs", ("fp8", -1, 0.0)),
    ("inputs", ("int8", 32, 0.0)),
    ("inputs", ("nvfp4", 16, 0.0)),
    ("inputs", ("fp8", 0, float("inf"))),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_arguments_that_do_not_fit_are_refused(name: str, value: Any) -> None:
    _native.pack_floats(**arguments())
    with pytest.raises((TypeError, ValueError)):
        _native.pack_floats(**{**arguments(), name: value})


def test_products_in_eight_bits_are_of_integers_only() -> None:
    linear = _native.pack_floats(**arguments())
    assert not linear.takes_eight_bit
    with pytest.raises(ValueError, match="eight_bit"):
        linear.multiply(torch.zeros(1, 64), torch.zeros(1, 16), True, 1)
