"""Which weights go: exact counts, ties, patterns, and the scores of the methods without an update."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.pruning import magnitude, ria, wanda
from compress.pruning.configs import RiaConfig, WandaConfig
from compress.pruning.masks import least, lowest
from compress.types import Sparsity


def scores(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 30), levels=st.integers(1, 5), seed=st.integers(0, 99))
def test_least_marks_the_count_and_of_equal_scores_the_first(rows: int, width: int, levels: int, seed: int) -> None:
    values = torch.randint(0, levels, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    for count in {0, width // 2, width}:
        marked = least(values, count)
        wanted = torch.zeros(rows, width, dtype=torch.bool)
        wanted.scatter_(1, values.argsort(dim=1, stable=True)[:, :count], True)
        assert torch.equal(marked, wanted)


def test_rows_and_matrices_lose_their_share_exactly() -> None:
    values = scores(7, 30)
    assert lowest(values, Sparsity(0.3), "row").sum(1).tolist() == [9] * 7
    assert int(lowest(values, Sparsity(0.3), "matrix").sum()) == 63
    assert lowest(values, Sparsity(0.3), "matrix").sum(1).tolist() != [9] * 7


@pytest.mark.parametrize(("pattern", "gone"), [("2:4", 2), ("1:4", 3), ("3:6", 3)])
def test_a_pattern_keeps_n_of_every_m(pattern: str, gone: int) -> None:
    sparsity = Sparsity.parse(pattern)
    marked = lowest(scores(5, 24), sparsity, "matrix").reshape(-1, sparsity.of or 0)
    assert bool((marked.sum(1) == gone).all())


@pytest.mark.parametrize("text", ["2", "4:2", "0:4", "2:4:8", "a:b", "2:2", "", "-1:4"])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match="not a pattern"):
        Sparsity.parse(text)


def test_the_scores_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 1.0, -1.5, 2.0]])
    square_mean = torch.tensor([100.0, 1.0, 1.0, 0.01])
    half = Sparsity(0.5)
    assert magnitude.mask(weight, half).tolist() == [[True, True, False, False], [False, True, True, False]]
    of_rows = wanda.mask(weight, square_mean, half, WandaConfig())
    assert of_rows.tolist() == [[False, True, False, True], [False, True, False, True]]
    plain = wanda.mask(weight, square_mean, half, WandaConfig(exponent=0))
    assert plain.tolist() == [[True, True, False, False], [False, True, True, False]]
    over_all = wanda.mask(weight, square_mean, half, WandaConfig(scope="matrix"))
    assert over_all.tolist() == [[False, False, False, True], [False, True, True, True]]
    shares = weight.abs() / weight.abs().sum(1, keepdim=True) + weight.abs() / weight.abs().sum(0)
    for exponent in (0.0, 0.5, 1.0):
        wanted = lowest(shares * square_mean ** (exponent / 2), half, "matrix")
        assert torch.equal(ria.mask(weight, square_mean, half, RiaConfig(exponent=exponent)), wanted)


def test_a_zero_row_has_no_shares_and_goes_first() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    marked = ria.mask(weight, torch.ones(2), Sparsity(0.5), RiaConfig())
    assert marked.tolist() == [[True, True], [False, False]]
