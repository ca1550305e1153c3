"""Rounding inputs as engines do: equal to the compressed-tensors package's, value for value."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from compress.formats.inputs import round_inputs, static_scale
from compress.types import InputScheme

SCHEMES = [
    InputScheme("int", "token"),
    InputScheme("float", "token"),
    InputScheme("int", "tensor"),
    InputScheme("float", "tensor"),
    InputScheme("float", "group", 32),
    InputScheme("float", "group", 16, 4, "e4m3"),
    InputScheme("float", "group", 32, 4, "e8m0"),
    InputScheme("float", "group", 32, 8, "e8m0"),
]
BLOCKS = {"e4m3": ("tensor_group", "local", torch.float8_e4m3fn), "e8m0": ("group", True, torch.uint8)}


def inputs() -> torch.Tensor:
    """Three sequences of tokens with outliers, one token of zeros."""
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 50
    x[1, 2] = 0
    return x


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_is_the_packages_rounding(scheme: InputScheme) -> None:
    x = inputs()
    strategy, dynamic, scale_dtype = BLOCKS.get(scheme.scale_type, (scheme.granularity, scheme.dynamic, None))
    args = QuantizationArgs(
        num_bits=scheme.bits,
        type=scheme.type,
        strategy=strategy,
        group_size=scheme.group_size,
        dynamic=dynamic,
        symmetric=True,
        scale_dtype=scale_dtype,
    )
    multiplier = None
    if scheme.scale_type == "e4m3":
        multiplier = torch.tensor([static_scale(float(x.abs().amax()) / 2, scheme)])
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1), multiplier)
        found = round_inputs(x, scheme, multiplier)
    elif scheme.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
        found = round_inputs(x, scheme)
    else:
        scale, zero = torch.tensor([static_scale(float(x.abs().amax()) / 2, scheme)]), None
        found = round_inputs(x, scheme, scale)
    expected = fake_quantize(x, scale, zero, args, multiplier)
    assert torch.equal(found, expected)
    assert not torch.equal(found, x)


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
def test_tokens_do_not_touch_each_other(scheme: InputScheme) -> None:
    x = inputs()
    alone = torch.stack([torch.stack([round_inputs(token, scheme) for token in row]) for row in x])
    assert torch.equal(round_inputs(x, scheme), alone)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_half_precision_keeps_its_dtype_and_computes_in_float32(scheme: InputScheme) -> None:
    x, scale = inputs().bfloat16(), None if scheme.dynamic else torch.tensor([0.7]).bfloat16()
    found = round_inputs(x, scheme, scale)
    assert found.dtype == torch.bfloat16
    wide = round_inputs(x.float(), scheme, None if scale is None else scale.float())
    assert torch.equal(found, wide.bfloat16())


def test_a_static_scale_covers_what_it_was_made_for() -> None:
    scheme = InputScheme("float", "tensor")
    x = torch.tensor([[-3.0, 1.5, 6.0]])
    assert float(round_inputs(x, scheme, torch.tensor([static_scale(3.0, scheme)]))[0, 2]) == pytest.approx(3.0)
