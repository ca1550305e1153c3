"""Tuned numbers: what they stand for is what is stored, and their gradients are those of the dense weight."""

from __future__ import annotations

import pytest
import torch

from compress.quantization.grid import min_max_grid, quantize
from compress.quantization.tuning import TunedScales, TunedVector
from compress.types import IntScheme, QuantizedTensor
from tests.quantization.data import normal


def quantized(bits: int = 4, *, symmetric: bool = True, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    weight = normal(6, 32, seed=0)
    return quantize(weight, min_max_grid(weight, IntScheme(bits, 8, symmetric), dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_a_scale_is_that_of_the_loss(symmetric: bool) -> None:
    start = quantized(symmetric=symmetric)
    tuned, pull = TunedScales(start), normal(6, 32, seed=1)
    tuned.backward(pull)
    assert tuned.change.grad is not None
    for row, group in ((0, 0), (3, 2), (5, 3)):
        moved = TunedScales(start)
        moved.change.data[row, group] = 1e-2
        slope = ((moved.dense() - tuned.dense()) * pull).sum() / 1e-2
        torch.testing.assert_close(tuned.change.grad[row, group], slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untouched_scales_are_those_of_the_start_and_moved_ones_are_stored_as_before(dtype: torch.dtype) -> None:
    start = quantized(symmetric=False, dtype=dtype)
    tuned = TunedScales(start)
    assert torch.equal(tuned.quantized().scale, start.scale)
    tuned.change.data.fill_(0.1)
    after = tuned.quantized()
    assert after.scale.dtype == dtype
    assert torch.equal(after.codes, start.codes)
    assert after.zero_point is not None
    assert start.zero_point is not None
    assert torch.equal(after.zero_point, start.zero_point)
    torch.testing.assert_close(after.scale.float(), 1.1 * start.scale.float(), rtol=1e-2, atol=0)
    assert torch.equal(tuned.dense(), after.dequantize())


def test_a_scale_never_leaves_what_its_dtype_holds() -> None:
    tuned = TunedScales(quantized(dtype=torch.float16))
    tuned.change.data.fill_(1e9)
    assert torch.isfinite(tuned.dense()).all()
    tuned.change.data.fill_(-1.0)
    assert (tuned.quantized().scale != 0).all()


@pytest.mark.parametrize("offset", [False, True])
def test_a_vector_moves_in_units_of_its_size(offset: bool) -> None:
    stored = torch.tensor([2.0, 4.0, -6.0], dtype=torch.bfloat16)
    tuned = TunedVector(stored, offset=offset)
    assert torch.equal(tuned.dense(), stored)
    unit = 1.0 if offset else 4.0
    tuned.backward(torch.ones(3))
    assert tuned.change.grad is not None
    assert torch.equal(tuned.change.grad, torch.full((3,), unit))
    tuned.change.data.fill_(0.25)
    assert torch.equal(tuned.dense(), (stored.float() + 0.25 * unit).to(torch.bfloat16))
