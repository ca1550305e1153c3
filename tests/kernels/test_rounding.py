"""The loss of rounding to nearest under candidate column scales: the native version against the plain one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.kernels import dispatch, reference


def make(
    rows: int, columns: int, candidates: int, seed: int = 0, sided: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, scales, importance); `sided`: every weight of one sign, where zero must join the range."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    scales = torch.rand(candidates, columns, generator=generator) * 3 + 0.3
    importance = torch.rand(candidates, columns, generator=generator)
    return weight.abs() + 0.01 if sided else weight, scales, importance


def assert_exact(
    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    group_size: int,
    bits: int,
    symmetric: bool,
    shares: tuple[float, ...] = (1.0, 0.85, 0.6),
) -> None:
    """Equal but for float32's rounding, which now and then puts a value on the other side of a boundary."""
    found = dispatch.rounding_loss(*arguments, shares, group_size, bits, symmetric)
    wanted = reference.rounding_loss(*(t.double() for t in arguments), shares, group_size, bits, symmetric)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-4, atol=1e-12)


@pytest.mark.parametrize("sided", [False, True], ids=["two-sided", "one-sided"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "candidates"),
    [(33, 256, 128, 20), (7, 172, 43, 3), (40, 96, 32, 1), (5, 129, 129, 2)],
)
def test_matches_the_oracle(
    isa: str, rows: int, columns: int, group_size: int, candidates: int, bits: int, symmetric: bool, sided: bool
) -> None:
    assert_exact(make(rows, columns, candidates, sided=sided), group_size, bits, symmetric)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    group_size=st.integers(2, 50),
    groups=st.integers(1, 4),
    candidates=st.integers(1, 4),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_shapes(
    isa: str, rows: int, group_size: int, groups: int, candidates: int, bits: int, symmetric: bool, seed: int
) -> None:
    assert_exact(make(rows, group_size * groups, candidates, seed), group_size, bits, symmetric)


def test_zeros_lose_nothing(isa: str) -> None:
    _, scales, importance = make(4, 64, 3)
    for symmetric in (True, False):
        assert dispatch.rounding_loss(
            torch.zeros(4, 64), scales, importance, (1.0, 0.8), 32, 4, symmetric
        ).tolist() == [0, 0, 0]


def test_nan_shows(isa: str) -> None:
    weight, scales, importance = make(4, 64, 2)
    weight[1, 5] = float("nan")
    assert dispatch.rounding_loss(weight, scales, importance, (1.0, 0.8), 32, 4, True).isnan().all()


def test_threads_change_no_bit(isa: str) -> None:
    arguments = make(150, 256, 5)
    one = dispatch.rounding_loss(*arguments, (1.0, 0.8), 64, 4, False, threads=1)
    for threads in (2, 3, 16):
        assert torch.equal(one, dispatch.rounding_loss(*arguments, (1.0, 0.8), 64, 4, False, threads=threads))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    arguments = make(33, 256, 4)
    found = dispatch.rounding_loss(*(t.cuda() for t in arguments), (1.0, 0.8), 64, 4, True)
    wanted = reference.rounding_loss(*(t.double() for t in arguments), (1.0, 0.8), 64, 4, True)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=2e-4, atol=1e-12)


def test_more_shares_cost_no_more(isa: str) -> None:
    arguments = make(33, 256, 4)
    whole = dispatch.rounding_loss(*arguments, (1.0,), 64, 3, True)
    clipped = dispatch.rounding_loss(*arguments, (1.0, 0.9, 0.8, 0.7), 64, 3, True)
    assert (clipped < whole).all()
