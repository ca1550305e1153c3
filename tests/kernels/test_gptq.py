"""GPTQ's column loop: the native and the batched version against the plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.kernels import batched, dispatch, reference
from tests.kernels.problems import Problem, make

# Shapes that leave a remainder in rows (tiles of 32), columns (chunks of 64) and strips (4, 6 or 8).
CASES = [
    pytest.param(1, 8, 1, {}, id="one-row"),
    pytest.param(33, 128, 1, {}, id="per-channel"),
    pytest.param(65, 192, 6, {"symmetric": False}, id="asymmetric"),
    pytest.param(31, 172, 4, {"bits": 3}, id="172-columns"),
    pytest.param(40, 129, 3, {"bits": 2, "symmetric": False}, id="2-bits"),
    pytest.param(64, 256, 2, {"bits": 8}, id="8-bits"),
    pytest.param(48, 256, 8, {"permuted": True}, id="act-order"),
    pytest.param(7, 65, 65, {}, id="groups-of-one"),
]


def assert_as_good(problem: Problem, codes: torch.Tensor, loss: torch.Tensor) -> None:
    """Codes equal the float64 oracle's but for rounding at a boundary, after which a row takes a path of its own."""
    exact = problem.double()
    wanted, wanted_loss = reference.gptq_quantize(exact.weight, exact.upper, *exact.grid)
    same_rows = (codes == wanted).all(dim=1)
    assert same_rows.double().mean() >= 0.9
    torch.testing.assert_close(loss[same_rows].double(), wanted_loss[same_rows], rtol=1e-4, atol=1e-9)
    assert abs(loss.double().sum() / wanted_loss.sum() - 1) < 0.01
    # The loss that GPTQ adds up is half the quadratic form it minimises.
    torch.testing.assert_close(2 * loss.double(), problem.objective(codes), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("out_features", "in_features", "groups", "options"), CASES)
def test_native_matches_the_oracle(isa: str, out_features: int, in_features: int, groups: int, options: dict) -> None:
    problem = make(out_features, in_features, groups, **options)
    assert_as_good(problem, *dispatch.gptq_quantize(problem.weight, problem.upper, *problem.grid))


@pytest.mark.parametrize(("out_features", "in_features", "groups", "options"), CASES)
def test_batched_matches_the_oracle(out_features: int, in_features: int, groups: int, options: dict) -> None:
    problem = make(out_features, in_features, groups, **options)
    assert_as_good(problem, *batched.gptq_quantize(problem.weight, problem.upper, *problem.grid))


@pytest.mark.parametrize(("out_features", "in_features", "groups", "options"), CASES[1:4])
def test_what_is_pruned_gets_the_code_of_zero(
    isa: str, out_features: int, in_features: int, groups: int, options: dict
) -> None:
    problem = make(out_features, in_features, groups, **options)
    marks = torch.rand(problem.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    exact = problem.double()
    wanted, _ = reference.gptq_quantize(exact.weight, exact.upper, *exact.grid, marks)
    for call in (dispatch.gptq_quantize, batched.gptq_quantize):
        codes, loss = call(problem.weight, problem.upper, *problem.grid, pruned=marks.to(torch.int8))
        assert not problem.dequantised(codes)[marks].any()
        assert (codes == wanted).all(dim=1).double().mean() >= 0.9
        torch.testing.assert_close(2 * loss.double(), problem.objective(codes), rtol=1e-3, atol=1e-9)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    out_features=st.integers(1, 70),
    group_size=st.integers(1, 40),
    groups=st.integers(1, 5),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_shapes(
    isa: str, out_features: int, group_size: int, groups: int, bits: int, symmetric: bool, seed: int
) -> None:
    if group_size == 1 and not symmetric:
        symmetric = True  # one weight has no range
    problem = make(out_features, group_size * groups, groups, bits=bits, symmetric=symmetric, seed=seed)
    codes, loss = dispatch.gptq_quantize(problem.weight, problem.upper, *problem.grid)
    assert problem.qmin <= int(codes.min()) <= int(codes.max()) <= problem.qmax
    torch.testing.assert_close(2 * loss.double(), problem.objective(codes), rtol=2e-3, atol=1e-9)
    exact = problem.double()
    wanted, _ = reference.gptq_quantize(exact.weight, exact.upper, *exact.grid)
    first = (codes[:, 0] == wanted[:, 0]).double().mean()  # nothing has been fed back yet
    assert first == 1


def test_the_feedback_pays(isa: str) -> None:
    problem = make(64, 256, 2)
    codes, _ = dispatch.gptq_quantize(problem.weight, problem.upper, *problem.grid)
    assert problem.objective(codes).sum() < 0.8 * problem.objective(problem.nearest()).sum()


def test_identity_hessian_is_round_to_nearest(isa: str) -> None:
    problem = make(37, 96, 3, symmetric=False)
    codes, _ = dispatch.gptq_quantize(problem.weight, torch.eye(96), *problem.grid)
    assert torch.equal(codes, problem.nearest())


def test_ties_round_to_even(isa: str) -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 100.0, -100.0]])
    codes, _ = dispatch.gptq_quantize(
        weight, torch.eye(8), torch.ones(1, 1), None, torch.zeros(8, dtype=torch.int32), -8, 7
    )
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2, 7, -8]]


def test_threads_change_no_bit(isa: str) -> None:
    problem = make(150, 256, 4, symmetric=False)
    one = dispatch.gptq_quantize(problem.weight, problem.upper, *problem.grid, threads=1)
    for threads in (2, 3, 16):
        many = dispatch.gptq_quantize(problem.weight, problem.upper, *problem.grid, threads=threads)
        assert torch.equal(one[0], many[0])
        assert torch.equal(one[1], many[1])


def test_rows_do_not_depend_on_their_neighbours(isa: str) -> None:
    problem = make(70, 128, 2)
    whole, _ = dispatch.gptq_quantize(problem.weight, problem.upper, *problem.grid)
    scale, zero_point, *rest = problem.grid
    part, _ = dispatch.gptq_quantize(problem.weight[40:], problem.upper, scale[40:], zero_point[40:], *rest)
    assert torch.equal(whole[40:], part)


def test_weight_is_not_modified(isa: str) -> None:
    problem = make(8, 64, 1)
    before = problem.weight.clone()
    dispatch.gptq_quantize(problem.weight, problem.upper, *problem.grid)
    assert torch.equal(problem.weight, before)


def test_nan_stays_in_its_row(isa: str) -> None:
    problem = make(8, 64, 1)
    clean, _ = dispatch.gptq_quantize(problem.weight, problem.upper, *problem.grid)
    problem.weight[3, 5] = float("nan")
    codes, loss = dispatch.gptq_quantize(problem.weight, problem.upper, *problem.grid)
    others = torch.arange(8) != 3
    assert torch.equal(codes[others], clean[others])
    assert loss[others].isfinite().all()
    assert loss[3].isnan()
    assert problem.qmin <= int(codes.min()) <= int(codes.max()) <= problem.qmax


@pytest.mark.gpu
def test_batched_on_a_gpu() -> None:
    problem = make(65, 192, 6, symmetric=False)
    arguments = [t.cuda() if isinstance(t, torch.Tensor) else t for t in (problem.weight, problem.upper, *problem.grid)]
    codes, loss = dispatch.gptq_quantize(*arguments)
    assert codes.is_cuda
    assert_as_good(problem, codes.cpu(), loss.cpu())
