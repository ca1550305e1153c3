"""Second moments: every instruction set against float64, panel by panel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.kernels import dispatch, reference
from compress.kernels.cpu import _native


def panels(left: torch.Tensor, right: torch.Tensor, height: int, upper: bool) -> torch.Tensor:
    width = left.shape[1]
    total = torch.zeros(width, width)
    for start in range(0, width, height):
        dispatch.add_moment(total, left, right, range(start, min(start + height, width)), upper)
    return total


@pytest.mark.usefixtures("isa")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.sampled_from([1, 2, 31, 255, 256, 257, 600]),
    width=st.sampled_from([1, 7, 47, 48, 49, 130, 200]),
    height=st.sampled_from([1, 5, 64, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_equals_float64(tokens: int, width: int, height: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(tokens, width, generator=generator).to(dtype)
    right = torch.randn(tokens, width, generator=generator).to(dtype)
    exact = left.double().T @ right.double()
    bound = 1e-6 * (left.double().abs().T @ right.double().abs()) + 1e-12
    assert ((panels(left, right, height, upper=False).double() - exact).abs() <= bound).all()
    upper = panels(left, right, height, upper=True)
    assert ((upper.double() - exact).triu().abs() <= bound).all()
    assert (upper[height:, :1] == 0).all(), "left of its first row a panel is not touched"


@pytest.mark.usefixtures("isa")
def test_adds_to_what_is_there_and_touches_only_its_rows() -> None:
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(1))
    total = torch.full((20, 20), 3.0)
    dispatch.add_moment(total, x, x, range(4, 9), upper=False)
    assert (total[:4] == 3).all()
    assert (total[9:] == 3).all()
    torch.testing.assert_close(total[4:9] - 3, (x.T @ x)[4:9], rtol=1e-5, atol=1e-5)
    wanted = torch.full((20, 20), 3.0)
    reference.add_moment(wanted, x, x, range(4, 9), upper=False)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("isa")
def test_not_a_number_reaches_its_row_and_column_only() -> None:
    x = torch.ones(10, 6, dtype=torch.bfloat16)
    x[3, 2] = torch.nan
    found = panels(x, x, 6, upper=False).isnan()
    assert found[2].all()
    assert found[:, 2].all()
    assert int(found.sum()) == 11


def test_refuses_what_does_not_fit() -> None:
    x, total = torch.ones(4, 6), torch.zeros(6, 6)
    with pytest.raises(ValueError, match="first, last"):
        _native.add_moment(total, x, x, 3, 7, False)
    with pytest.raises(ValueError, match="b must be of shape"):
        _native.add_moment(total, x, torch.ones(5, 6), 0, 6, False)
    with pytest.raises(TypeError, match="dtype of a"):
        _native.add_moment(total, x, x.bfloat16(), 0, 6, False)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        _native.add_moment(total, x.half(), x.half(), 0, 6, False)
