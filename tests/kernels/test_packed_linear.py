"""Products with repacked weights against float64, for every layout and every instruction set, and what they refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.formats.inputs import round_inputs
from compress.formats.int_packed import pack_bits
from compress.kernels import packed_linear
from compress.kernels.cpu import _native
from compress.types import InputScheme, IntScheme, QuantizedTensor, ternary_scheme

TOKENS = (1, 2, 3, 5, 8, 9, 33)
INT8 = InputScheme("int", "token")
SHAPES = {128: (37, 256), 64: (70, 192), 32: (16, 96), None: (33, 100)}  # group -> odd numbers of rows, uneven columns
EXACT, EIGHT_BIT = 4e-6, 0.1  # largest error over the outputs' root mean square


def quantized(rows: int, columns: int, scheme: IntScheme, dtype: torch.dtype, seed: int = 0) -> QuantizedTensor:
    """Random codes over their whole range."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)

    def draw(*size: int) -> Tensor:
        return torch.randint(scheme.qmin, scheme.qmax + 1, size, dtype=torch.int8, generator=generator)

    scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).to(dtype)
    return QuantizedTensor(draw(rows, columns), scale, None if scheme.symmetric else draw(rows, groups), scheme)


def packed(weight: QuantizedTensor, bias: Tensor | None = None, threads: int = 1) -> Any:
    words = pack_bits(weight.codes, weight.scheme.bits)
    columns = weight.codes.shape[1]
    return packed_linear.pack_codes(
        words, weight.scale, weight.zero_point, columns, weight.scheme, bias, threads
    )  # fmt: skip


def inputs(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


ROUNDED = {
    "token": IntScheme(8, None, inputs=INT8),
    "static": IntScheme(8, None, inputs=InputScheme("int", "tensor")),
    "ternary": ternary_scheme(),
    **{f"group {group}": IntScheme(8, group, inputs=INT8) for group in (128, 64, 32)},
}


@pytest.mark.parametrize("name", ROUNDED)
def test_inputs_that_the_format_rounds(name: str, isa: str) -> None:
    """Rounded as `formats.inputs` rounds them; integer products differ by nothing but float32's rounding."""
    scheme = ROUNDED[name]
    assert scheme.inputs is not None
    rows, columns = SHAPES[scheme.group_size]
    weight = quantized(rows, columns, scheme, torch.float32)
    scale = 0.0 if scheme.inputs.dynamic else 0.015
    words = pack_bits(weight.codes, scheme.bits)
    linear = packed_linear.pack_codes(words, weight.scale, None, columns, scheme, threads=1, input_scale=scale)
    for tokens in TOKENS:
        x = inputs(tokens, columns)
        x[1:2] = 0
        rounded = round_inputs(x, scheme.inputs, None if scheme.inputs.dynamic else torch.tensor([scale]))
        expected = rounded.double() @ weight.dequantize().double().T
        for eight_bit in (False, True):
            assert error(packed_linear.multiply(linear, x, eight_bit, threads=1), expected) < EXACT
    x[0, 3] = torch.inf
    assert not packed_linear.multiply(linear, x, threads=1)[0].isfinite().any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_products_are_those_of_the_format(bits: int, group: int | None, symmetric: bool, isa: str) -> None:
    rows, columns = SHAPES[group]
    weight = quantized(rows, columns, IntScheme(bits, group, symmetric), torch.bfloat16)
    linear = packed(weight)
    for tokens in TOKENS:
        x = inputs(tokens, columns)
        expected = x.double() @ weight.dequantize().double().T
        assert error(packed_linear.multiply(linear, x, threads=1), expected) < EXACT
        assert error(packed_linear.multiply(linear, x, eight_bit=True, threads=1), expected) < EIGHT_BIT


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_outliers_leave_the_other_inputs_their_bits(bits: int, group: int | None, symmetric: bool, isa: str) -> None:
    """First with no weights of outliers, so that the others' error shows; then with all."""
    rows, columns = SHAPES[group]
    weight = quantized(rows, columns, IntScheme(bits, group, symmetric), torch.bfloat16)
    outliers = torch.tensor([3, columns // 2, columns - 1])
    zero = 0 if weight.zero_point is None else weight.zero_point[:, outliers // (group or columns)]
    without = QuantizedTensor(weight.codes.clone(), weight.scale, weight.zero_point, weight.scheme)
    without.codes[:, outliers] = zero
    for tokens in TOKENS:
        x = inputs(tokens, columns)
        x[1::2, outliers] *= torch.tensor([300.0, -100.0, 50.0])
        for kept, bound in ((without, 2 * EIGHT_BIT), (weight, EIGHT_BIT / 2)):
            found = packed_linear.multiply(packed(kept), x, eight_bit=True, threads=1)[1::2]
            if len(found):
                assert error(found, x[1::2].double() @ kept.dequantize().double().T) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_weights_have_the_values_that_their_scales_dtype_gives(bits: int, dtype: torch.dtype, isa: str) -> None:
    """One product per output, so that no sum rounds: columns together and one alone."""
    weight = quantized(21, 96, IntScheme(bits, 32, False), dtype)
    weight.scale[0] = torch.finfo(dtype).tiny / 4  # subnormal
    weight.scale[1] = 2.0**8 if dtype is torch.float16 else 2.0**95
    linear, eye, expected = packed(weight), torch.eye(96), weight.dequantize().float().T
    assert torch.equal(packed_linear.multiply(linear, eye, threads=1), expected)
    for column in range(96):
        assert torch.equal(packed_linear.multiply(linear, eye[column : column + 1], threads=1)[0], expected[column])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_weights_are_kept_as_they_are(dtype: torch.dtype, isa: str) -> None:
    weight, bias = inputs(53, 101).to(dtype), inputs(1, 53)[0]
    linear = packed_linear.pack_dense(weight, bias, threads=1)
    for tokens in TOKENS:
        x = inputs(tokens, 101)
        expected = x.double() @ weight.double().T + bias.double()
        assert error(packed_linear.multiply(linear, x, threads=1), expected) < EXACT


@pytest.mark.parametrize("columns", [256, 96, 50])
def test_a_head_in_eight_bits_is_rounded_to_nearest(columns: int, isa: str) -> None:
    weight = inputs(33, columns)
    linear = packed_linear.pack_dense(weight, eight_bit=True, threads=1)
    assert linear.bits == 8
    kept = packed_linear.multiply(linear, torch.eye(columns), threads=1).T
    assert float((kept - weight).abs().max()) <= float(weight.abs().max()) / 127 / 2 * 1.001


@pytest.mark.parametrize(
    ("weight", "columns", "group"),
    [
        *((bits, columns, group) for bits in (2, 3, 4, 5, 6, 8) for columns, group in ((256, 128), (300, None))),
        (torch.bfloat16, 256, None),
        (torch.float32, 256, None),
    ],
)
@pytest.mark.parametrize("eight_bit", [False, True])
def test_an_output_depends_on_no_other_token_and_on_no_thread(
    eight_bit: bool, weight: int | torch.dtype, columns: int, group: int | None, isa: str
) -> None:
    """Of several groups of columns, and of one group of several blocks."""
    x = inputs(40, columns)
    if isinstance(weight, int):
        stored = quantized(200, columns, IntScheme(weight, group, False), torch.bfloat16)
        linear = packed(stored, threads=3)
        expected = x.double() @ stored.dequantize().double().T
        assert error(packed_linear.multiply(linear, x, eight_bit, threads=1), expected) < (
            EIGHT_BIT if eight_bit else EXACT
        )
    elif eight_bit:
        linear = packed_linear.pack_dense(inputs(200, columns).to(weight), eight_bit=True, threads=3)
    else:
        linear = packed_linear.pack_dense(inputs(200, columns).to(weight), threads=3)
    x[::3, 100] *= 300  # outliers of 8 bits
    alone = torch.cat([packed_linear.multiply(linear, row.unsqueeze(0), eight_bit, threads=1) for row in x])
    for size in (2, 3, 7, 8, 11, 40):
        parts = [packed_linear.multiply(linear, part, eight_bit, threads=3) for part in x.split(size)]
        assert torch.equal(torch.cat(parts), alone)


def test_every_instruction_set_agrees_on_eight_bit_sums() -> None:
    linear = packed(quantized(40, 128, IntScheme(8, 128, True), torch.float32))
    x = torch.full((3, 128), 127.0)  # the largest codes everywhere: where 16-bit sums would saturate
    x[1] = -127.0
    before, found = _native.isa(), []
    for isa in _native.available_isas():
        _native.set_isa(isa)
        found.append(packed_linear.multiply(linear, x, eight_bit=True, threads=1))
    _native.set_isa(before)
    assert all(torch.allclose(found[0], other, rtol=1e-6) for other in found)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [64, 127, 200])
def test_prefill_sizes(tokens: int, isa: str) -> None:
    weight = quantized(131, 1000 - 8, IntScheme(4, None, False), torch.bfloat16)
    linear, x = packed(weight), inputs(tokens, 992)
    expected = x.double() @ weight.dequantize().double().T
    assert error(packed_linear.multiply(linear, x, threads=2), expected) < EXACT
    assert error(packed_linear.multiply(linear, x, eight_bit=True, threads=2), expected) < EIGHT_BIT


def test_inputs_that_are_not_finite_show() -> None:
    linear = packed(quantized(16, 64, IntScheme(4, 32), torch.bfloat16))
    for poison in (torch.nan, torch.inf):
        x = torch.zeros(1, 64)
        x[0, 40] = poison
        assert not torch.isfinite(packed_linear.multiply(linear, x, eight_bit=True, threads=1)).any()


def arguments() -> dict[str, Any]:
    return {
        "packed": torch.zeros(16, 8, dtype=torch.int32),
        "scale": torch.ones(16, 2),
        "zero_point": torch.zeros(16, 2, dtype=torch.int8),
        "columns": 64,
        "group_size": 32,
        "bits": 4,
        "bias": None,
        "threads": 1,
        "inputs": ("none", 0, 0.0),
    }


BAD: list[tuple[str, Any]] = [
    ("packed", torch.zeros(16, 7, dtype=torch.int32)),
    ("packed", torch.zeros(16, 8)),
    ("packed", torch.zeros(8, 16, dtype=torch.int32).T),
    ("packed", torch.zeros(0, 8, dtype=torch.int32)),
    ("scale", torch.ones(16, 3)),
    ("scale", torch.ones(16, 2, dtype=torch.float64)),
    ("zero_point", torch.full((16, 2), 9, dtype=torch.int8)),
    ("zero_point", torch.zeros(2, 16, dtype=torch.int8)),
    ("columns", 0),
    ("columns", 2**62),
    ("columns", -64),
    ("group_size", 0),
    ("group_size", 16),
    ("group_size", -32),
    ("bits", 1),
    ("bits", 9),
    ("bias", torch.zeros(15)),
    ("threads", 0),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_arguments_that_do_not_fit_are_refused(name: str, value: Any) -> None:
    _native.pack_codes(**arguments())
    with pytest.raises((TypeError, ValueError)):
        _native.pack_codes(**{**arguments(), name: value})


@pytest.mark.parametrize(
    "call",
    [
        lambda linear: linear.multiply(torch.zeros(1, 63), torch.zeros(1, 16), False, 1),
        lambda linear: linear.multiply(torch.zeros(1, 64), torch.zeros(2, 16), False, 1),
        lambda linear: linear.multiply(torch.zeros(0, 64), torch.zeros(0, 16), False, 1),
        lambda linear: linear.multiply(torch.zeros(1, 64), torch.zeros(1, 16), False, 0),
        lambda linear: linear.multiply(torch.zeros(1, 64).double(), torch.zeros(1, 16), False, 1),
        lambda _: _native.pack_dense(torch.zeros(4, 4).half(), 0, None, 1),
        lambda _: _native.pack_dense(torch.zeros(4, 64), 48, None, 1),
        lambda _: _native.pack_dense(torch.zeros(4, 64), 0, None, 1).multiply(
            torch.zeros(1, 64), torch.zeros(1, 4), True, 1
        ),
    ],
)
def test_products_that_do_not_fit_are_refused(call: Callable[[Any], None]) -> None:
    with pytest.raises((TypeError, ValueError)):
        call(_native.pack_codes(**arguments()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_multiplies_too() -> None:
    linear, x = packed(quantized(200, 256, IntScheme(4, 128), torch.bfloat16)), inputs(4, 256)
    expected = packed_linear.multiply(linear, x, threads=2)
    child = os.fork()
    if child == 0:
        out = torch.empty_like(expected)
        linear.multiply(x, out, False, 2)
        os._exit(0 if torch.equal(out, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
