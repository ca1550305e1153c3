"""Moves of codes: against the gradient, in range, as far as gradient over curvature says; against definitions."""

from __future__ import annotations

import pytest
import torch

from compress.quantization.moves import Curvature, code_promise, moved, zero_point_promise
from compress.types import IntScheme, QuantizedTensor


def weight(bits: int = 3, symmetric: bool = False) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    scheme = IntScheme(bits, 8, symmetric)
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (6, 24), generator=generator, dtype=torch.int8)
    zero = torch.randint(scheme.qmin, scheme.qmax + 1, (6, 3), generator=generator, dtype=torch.int8)
    scale = torch.rand(6, 3, generator=generator) + 0.1
    return QuantizedTensor(codes, scale, None if symmetric else zero, scheme)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_promise_is_the_newton_step_in_codes_and_never_leaves_the_range(symmetric: bool) -> None:
    start, generator = weight(symmetric=symmetric), torch.Generator().manual_seed(1)
    gradient = torch.randn(6, 24, generator=generator)
    curvature = torch.rand(6, 24, generator=generator) + 0.1
    fixed = torch.rand(6, 24, generator=generator) < 0.2
    promise = code_promise(start, gradient, curvature, fixed)
    for row, column in [(r, c) for r in range(6) for c in range(24)]:
        steps = -gradient[row, column] / (curvature[row, column] * start.scale[row, column // 8])
        code = int(start.codes[row, column]) + (1 if steps > 0 else -1)
        stays = fixed[row, column] or not start.scheme.qmin <= code <= start.scheme.qmax
        torch.testing.assert_close(promise[row, column], torch.tensor(0.0) if stays else steps)
    none = torch.zeros(6, 3)
    found = moved(start, promise, none, 0.5)
    assert torch.equal(found.codes != start.codes, promise.abs() >= 0.5)
    assert found.codes.min() >= start.scheme.qmin
    assert found.codes.max() <= start.scheme.qmax
    assert found.dequantize().shape == (6, 24)
    towards = (found.dequantize() - start.dequantize()) * gradient
    assert (towards <= 0).all()


def test_a_zero_point_moves_its_whole_group_against_the_gradient() -> None:
    start, gradient = weight(), torch.randn(6, 24, generator=torch.Generator().manual_seed(2))
    promise = zero_point_promise(start, gradient, torch.ones(6, 3), None)
    found = moved(start, torch.zeros(6, 24), promise, 0.5)
    assert found.zero_point is not None
    assert start.zero_point is not None
    assert torch.equal(found.zero_point != start.zero_point, promise.abs() >= 0.5)
    change = ((found.dequantize() - start.dequantize()) * gradient).unflatten(1, (3, 8)).sum(-1)
    assert (change[promise.abs() >= 0.5] < 0).all()
    assert torch.equal(zero_point_promise(weight(symmetric=True), gradient, torch.ones(6, 3), None), torch.zeros(6, 3))
    fixed = torch.zeros(6, 24, dtype=torch.bool)
    fixed[2, 9] = True
    promise[2, 1] = 0.0
    assert torch.equal(zero_point_promise(start, gradient, torch.ones(6, 3), fixed), promise)


def test_the_curvature_is_that_of_a_quadratic_where_rows_and_columns_are_independent() -> None:
    generator = torch.Generator().manual_seed(3)
    rows, columns = torch.rand(6, generator=generator) + 0.5, torch.rand(24, generator=generator) + 0.5
    found = Curvature(torch.Size((6, 24)), IntScheme(3, 8))
    for _ in range(4000):
        pulls, inputs = torch.randn(6, generator=generator) * rows, torch.randn(24, generator=generator) * columns
        found.add(torch.outer(pulls, inputs), 1)
    expected = torch.outer(rows.square(), columns.square())
    torch.testing.assert_close(found.of_weights(), expected, rtol=0.15, atol=0.0)
    torch.testing.assert_close(found.of_groups(), expected.unflatten(1, (3, 8)).sum(-1), rtol=0.25, atol=0.0)


def test_what_no_draw_reached_stays() -> None:
    start = weight()
    found = Curvature(torch.Size((6, 24)), IntScheme(3, 8, False))
    found.add(torch.zeros(6, 24), 10)
    assert not code_promise(start, torch.ones(6, 24), found.of_weights(), None).any()
    assert not zero_point_promise(start, torch.ones(6, 24), found.of_groups(), None).any()
