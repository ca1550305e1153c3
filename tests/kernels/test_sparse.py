"""SparseGPT's column loop within a block: the native version against the plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.kernels import dispatch, reference
from tests.kernels.problems import make


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight, upper, and a random mask (rows, columns) of about half the weights."""
    made = make(rows, columns, 1, seed=seed)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    return made.weight.clone(), made.upper, mask.to(torch.int8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 70), columns=st.integers(1, 90), seed=st.integers(0, 1000))
def test_given_masks_match_the_oracle(isa: str, rows: int, columns: int, seed: int) -> None:
    weight, upper, mask = problem(rows, columns, seed)
    exact = weight.double()
    wanted = reference.prune_columns(exact, upper.double(), mask.clone(), 0, 0)
    errors = dispatch.prune_columns(weight, upper, mask)
    torch.testing.assert_close(weight.double(), exact, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(errors.double(), wanted, rtol=1e-3, atol=1e-5)
    assert bool((weight[mask != 0] == 0).all())


@pytest.mark.parametrize(("group", "kept"), [(4, 2), (8, 3), (3, 1), (24, 12)])
def test_patterns_match_the_oracle(isa: str, group: int, kept: int) -> None:
    weight, upper, _ = problem(45, 72)
    exact, chosen = weight.double(), torch.empty(45, 72, dtype=torch.int8)
    mask = torch.full((45, 72), 7, dtype=torch.int8)
    reference.prune_columns(exact, upper.double(), chosen, group, group - kept)
    dispatch.prune_columns(weight, upper, mask, group, group - kept)
    same = (mask == chosen).all(1)
    assert same.double().mean() > 0.9, "rows in which two scores nearly tie may differ"
    torch.testing.assert_close(weight[same].double(), exact[same], rtol=1e-3, atol=1e-6)
    assert bool((mask.reshape(45, -1, group).sum(2) == group - kept).all())


def test_ties_go_first_come(isa: str) -> None:
    mask = torch.empty(1, 4, dtype=torch.int8)
    weight = torch.ones(1, 4)
    dispatch.prune_columns(weight, torch.eye(4), mask, 4, 2)
    assert mask.tolist() == [[1, 1, 0, 0]]
    assert weight.tolist() == [[0, 0, 1, 1]]


def test_threads_and_neighbours_change_no_bit(isa: str) -> None:
    weight, upper, mask = problem(150, 96)
    one = weight.clone()
    first = dispatch.prune_columns(one, upper, mask, threads=1)
    many = weight.clone()
    assert torch.equal(dispatch.prune_columns(many, upper, mask, threads=3), first)
    assert torch.equal(many, one)
    part = weight[40:].clone()
    dispatch.prune_columns(part, upper, mask[40:].clone(), threads=1)
    assert torch.equal(part, one[40:])


def test_what_does_not_fit_is_refused(isa: str) -> None:
    weight, upper, mask = problem(4, 10)
    with pytest.raises(ValueError, match="group"):
        dispatch.prune_columns(weight, upper, mask, 4, 2)
    with pytest.raises(ValueError, match="drop"):
        dispatch.prune_columns(weight, upper, mask, 5, 6)
