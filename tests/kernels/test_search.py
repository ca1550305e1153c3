"""The search for the range of every group's grid: the native version against the plain one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.kernels import dispatch, reference

SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64)
OFFSETS = (-0.04, -0.02, 0.02, 0.04)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(
    rows: int, groups: int, size: int, weighted: bool = True, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, importance): importance of correlated inputs, or None."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * size, generator=generator) * 0.02
    if not weighted:
        return weight, None
    x = torch.randn(groups, 2 * size, size, generator=generator)
    x = x @ (torch.eye(size) + torch.randn(groups, size, size, generator=generator) / size**0.5)
    return weight, x.transpose(1, 2) @ x / (2 * size)


def assert_best(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    size: int,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    offsets: tuple[float, ...] = OFFSETS,
) -> None:
    """The same candidates as the plain version's, but where they cost the same to float32's rounding.

    The oracle is in float32 too: the largest weight of a group lies on a rounding boundary of the whole range, and
    float64 would round it to the other side.
    """
    form = (bits, symmetric, dtype)
    share, sign = dispatch.search_range(weight, importance, SHARES, offsets, size, *form)
    wanted = reference.search_range(weight, importance, SHARES, offsets, size, *form)
    equal = (share == wanted[0]) & (sign == wanted[1])
    loss = reference.range_loss(weight, importance, share, sign, *form)
    least = reference.range_loss(weight, importance, *wanted, *form)
    if offsets:  # from the other of two equals, the offsets may lead elsewhere
        assert (equal | torch.isclose(loss, least, rtol=1e-4)).double().mean() > 0.97 or (~equal).sum() <= 3
    else:
        torch.testing.assert_close(loss, least, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("rows", "groups", "size"), [(70, 2, 128), (33, 4, 43), (1, 3, 6), (5, 1, 129)])
@pytest.mark.parametrize("weighted", [True, False])
def test_matches_the_oracle(
    isa: str, rows: int, groups: int, size: int, bits: int, symmetric: bool, dtype: torch.dtype, weighted: bool
) -> None:
    weight, importance = make(rows, groups, size, weighted)
    assert_best(weight, importance, size, bits, symmetric, dtype)
    assert_best(weight, importance, size, bits, symmetric, dtype, ())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    size=st.integers(2, 50),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-8, 1e-5, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_random_shapes_and_sizes(
    isa: str,
    rows: int,
    groups: int,
    size: int,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    magnitude: float,
    seed: int,
) -> None:
    weight, importance = make(rows, groups, size, seed=seed)
    assert_best(weight * magnitude, importance, size, bits, symmetric, dtype, ())


def test_nothing_to_choose(isa: str) -> None:
    """Groups of zeros, and errors that are not numbers, keep the whole range."""
    weight, importance = make(3, 2, 16)
    weight[0] = 0
    weight[2, 3] = torch.nan
    for symmetric in (True, False):
        share, sign = dispatch.search_range(weight, importance, SHARES, OFFSETS, 16, 4, symmetric, torch.float16)
        assert share[0].tolist() == [1, 1]
        assert sign[0].tolist() == [1, 1]
        assert share[2, 0] == 1


def test_threads_change_no_bit(isa: str) -> None:
    weight, importance = make(150, 2, 64)
    one = dispatch.search_range(weight, importance, SHARES, OFFSETS, 64, 4, True, torch.bfloat16, threads=1)
    for threads in (2, 3, 16):
        again = dispatch.search_range(weight, importance, SHARES, OFFSETS, 64, 4, True, torch.bfloat16, threads=threads)
        assert torch.equal(one[0], again[0])
        assert torch.equal(one[1], again[1])


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    weight, importance = make(33, 2, 64)
    assert importance is not None
    found = dispatch.search_range(weight.cuda(), importance.cuda(), SHARES, OFFSETS, 64, 4, True, torch.bfloat16)
    wanted = reference.search_range(weight, importance, SHARES, OFFSETS, 64, 4, True, torch.bfloat16)
    assert (found[0].cpu() == wanted[0]).double().mean() > 0.95
