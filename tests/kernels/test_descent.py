"""Coordinate descent on codes: the native and the batched version against the plain loop, and what it promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.kernels import batched, dispatch, reference
from tests.kernels.problems import Problem, make

Descend = Callable[..., int]
CASES = [
    pytest.param(1, 8, 1, {}, id="one-row"),
    pytest.param(33, 128, 1, {}, id="per-channel"),
    pytest.param(65, 192, 6, {"symmetric": False}, id="asymmetric"),
    pytest.param(31, 172, 4, {"bits": 3}, id="172-columns"),
    pytest.param(40, 129, 3, {"bits": 2, "symmetric": False}, id="2-bits"),
    pytest.param(48, 300, 6, {"permuted": True}, id="act-order"),
]


def descend(call: Descend, problem: Problem, sweeps: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(codes, gradient, changes) after `sweeps` sweeps from round to nearest."""
    codes = problem.nearest()
    gradient = (problem.weight - problem.dequantised(codes)) @ problem.hessian
    changes = call(gradient, problem.hessian, *problem.grid, codes, sweeps, **options)
    return codes, gradient, changes


def assert_as_good(call: Descend, problem: Problem) -> None:
    exact = problem.double()
    wanted, _, wanted_changes = descend(reference.coordinate_descent, exact, 3)
    codes, gradient, changes = descend(call, problem, 3)
    assert (codes == wanted).all(dim=1).double().mean() >= 0.9
    assert abs(changes - wanted_changes) <= max(3, 0.02 * wanted_changes)
    torch.testing.assert_close(problem.objective(codes).sum(), problem.objective(wanted).sum(), rtol=1e-3, atol=0)
    # The gradient was kept up to date throughout.
    error = exact.weight - exact.dequantised(codes)
    torch.testing.assert_close(
        gradient.double(), error @ exact.hessian, rtol=0, atol=1e-5 * float(gradient.abs().max()) + 1e-7
    )


@pytest.mark.parametrize(("out_features", "in_features", "groups", "options"), CASES)
def test_native_matches_the_oracle(isa: str, out_features: int, in_features: int, groups: int, options: dict) -> None:
    assert_as_good(dispatch.coordinate_descent, make(out_features, in_features, groups, **options))


@pytest.mark.parametrize(("out_features", "in_features", "groups", "options"), CASES)
def test_batched_matches_the_oracle(out_features: int, in_features: int, groups: int, options: dict) -> None:
    assert_as_good(batched.coordinate_descent, make(out_features, in_features, groups, **options))


@pytest.mark.parametrize(("out_features", "in_features", "groups", "options"), CASES[1:4])
def test_what_is_pruned_stays_at_zero(
    isa: str, out_features: int, in_features: int, groups: int, options: dict
) -> None:
    problem = make(out_features, in_features, groups, **options)
    marks = torch.rand(problem.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    wanted, _, _ = descend(reference.coordinate_descent, problem.double(), 3, pruned=marks)
    for call in (dispatch.coordinate_descent, batched.coordinate_descent):
        codes, _, _ = descend(call, problem, 3, pruned=marks.to(torch.int8))
        assert not problem.dequantised(codes)[marks].any()
        torch.testing.assert_close(problem.objective(codes).sum(), problem.objective(wanted).sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_sweep_makes_a_row_worse(isa: str, bits: int) -> None:
    problem = make(50, 160, 5, bits=bits, symmetric=bits != 3)
    codes = problem.nearest()
    gradient = (problem.weight - problem.dequantised(codes)) @ problem.hessian
    before = first = problem.objective(codes)
    for _ in range(5):
        dispatch.coordinate_descent(gradient, problem.hessian, *problem.grid, codes, 1)
        after = problem.objective(codes)
        assert (after <= before * (1 + 1e-6) + 1e-12).all()
        before = after
    assert before.sum() < 0.9 * first.sum()


def test_stops_when_nothing_changes(isa: str) -> None:
    problem = make(40, 96, 3)
    codes, gradient, changes = descend(dispatch.coordinate_descent, problem, 100)
    assert changes > 0
    settled, settled_gradient = codes.clone(), gradient.clone()
    assert dispatch.coordinate_descent(gradient, problem.hessian, *problem.grid, codes, 100) == 0
    assert torch.equal(codes, settled)
    assert torch.equal(gradient, settled_gradient)
    # At a fixed point no single code has a better value.
    objective = problem.objective(codes)
    for column in range(0, 96, 7):
        for step in (-1, 1):
            other = codes.clone()
            other[:, column] = (codes[:, column] + step).clamp(problem.qmin, problem.qmax)
            assert (problem.objective(other) >= objective * (1 - 1e-5) - 1e-12).all()


def test_zero_sweeps_change_nothing(isa: str) -> None:
    problem = make(5, 32, 1)
    codes, _, changes = descend(dispatch.coordinate_descent, problem, 0)
    assert changes == 0
    assert torch.equal(codes, problem.nearest())


def test_threads_change_no_bit(isa: str) -> None:
    problem = make(150, 256, 4, symmetric=False)
    one = descend(dispatch.coordinate_descent, problem, 4, threads=1)
    for threads in (2, 3, 16):
        many = descend(dispatch.coordinate_descent, problem, 4, threads=threads)
        assert torch.equal(one[0], many[0])
        assert torch.equal(one[1], many[1])
        assert one[2] == many[2]


def test_dead_columns_stay(isa: str) -> None:
    problem = make(20, 100, 2)
    for column in (0, 70, 99):
        problem.hessian[column] = 0
        problem.hessian[:, column] = 0
    codes = problem.nearest()
    before = codes.clone()
    gradient = (problem.weight - problem.dequantised(codes)) @ problem.hessian
    assert dispatch.coordinate_descent(gradient, problem.hessian, *problem.grid, codes, 3) > 0
    assert torch.equal(codes[:, [0, 70, 99]], before[:, [0, 70, 99]])
    assert gradient.isfinite().all()


@pytest.mark.gpu
def test_batched_on_a_gpu() -> None:
    problem = make(65, 192, 6, symmetric=False)

    def on_gpu(gradient: torch.Tensor, hessian: torch.Tensor, *rest: object) -> int:
        *grid, codes, sweeps = (t.cuda() if isinstance(t, torch.Tensor) else t for t in rest)
        moved = gradient.cuda()
        changes = dispatch.coordinate_descent(moved, hessian.cuda(), *grid, codes, sweeps)
        gradient.copy_(moved)
        rest[-2].copy_(codes)
        return changes

    assert_as_good(on_gpu, problem)
