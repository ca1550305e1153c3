"""SparseGPT on one linear: against the plain loop over columns, exact sparsity, and what the refit wins."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from compress.kernels import reference
from compress.pruning import sparsegpt, wanda
from compress.pruning.configs import WandaConfig
from compress.types import Sparsity
from tests.kernels.problems import make

POOL = ThreadPoolExecutor(2)
HALF, PATTERN = Sparsity(0.5), Sparsity.parse("2:4")


def objective(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(w - q) H (w - q)^T per row."""
    error = weight.double() - pruned.double()
    return (error @ hessian.double() * error).sum(1)


def test_a_pattern_matches_the_plain_loop_over_all_columns() -> None:
    problem = make(150, 296, 1)  # more rows than a tile, more columns than a block
    exact = problem.weight.double()
    mask = torch.empty(exact.shape, dtype=torch.int8)
    reference.prune_columns(exact, problem.upper.double(), mask, 4, 2)
    found = sparsegpt.prune(problem.weight, problem.upper, torch.arange(296), PATTERN, POOL)
    same = ((found == 0) == (mask != 0)).all(1)
    assert same.double().mean() > 0.8, "a row in which two scores nearly tie takes a path of its own"
    torch.testing.assert_close(found[same].double(), exact[same], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sparsity", [HALF, PATTERN, Sparsity(0.37), Sparsity.parse("96:192")], ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_the_sparsity_is_exact(sparsity: Sparsity, ordered: bool) -> None:
    problem = make(131, 192, 1)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    if not ordered or sparsity.of is not None:
        order = torch.arange(192)
    found = sparsegpt.prune(problem.weight, problem.upper, order, sparsity, POOL)
    assert int((found == 0).sum()) == round(sparsity.share * found.numel())
    if sparsity.of is not None:
        assert bool(((found == 0).reshape(-1, sparsity.of).sum(1) == sparsity.of - (sparsity.kept or 0)).all())


def test_the_update_pays_and_the_refit_pays_more() -> None:
    problem = make(64, 256, 1)
    order = torch.arange(256)
    plain = problem.weight.masked_fill(wanda.mask(problem.weight, problem.hessian.diagonal(), HALF, WandaConfig()), 0)
    updated = sparsegpt.prune(problem.weight, problem.upper, order, HALF, POOL)
    refitted = sparsegpt.refit(problem.weight, updated, problem.hessian, 100, POOL)
    losses = [objective(problem.weight, q, problem.hessian) for q in (plain, updated, refitted)]
    assert losses[1].sum() < 0.8 * losses[0].sum()
    assert bool((losses[2] <= losses[1] * (1 + 1e-6)).all())
    assert losses[2].sum() < 0.95 * losses[1].sum()
    assert torch.equal(refitted == 0, updated == 0)


def test_the_refit_is_least_squares_on_the_support() -> None:
    problem = make(5, 40, 1)
    start = sparsegpt.prune(problem.weight, problem.upper, torch.arange(40), HALF, POOL)
    found = sparsegpt.refit(problem.weight, start, problem.hessian, 200, POOL)
    hessian, target = problem.hessian.double(), problem.weight.double()
    for row in range(5):
        kept = start[row].nonzero().squeeze(1)
        wanted = torch.linalg.solve(hessian[kept][:, kept], (hessian @ target[row])[kept])
        torch.testing.assert_close(found[row, kept].double(), wanted, rtol=1e-3, atol=1e-5)


def test_rows_that_a_refit_cannot_improve_stay() -> None:
    problem = make(3, 32, 1)
    broken = problem.weight.masked_fill(problem.weight.abs() < 0.02, 0)
    hessian = torch.full((32, 32), float("nan"))
    assert torch.equal(sparsegpt.refit(problem.weight, broken, hessian, 5, POOL), broken)
    assert sparsegpt.refit(problem.weight, broken, problem.hessian, 0, POOL) is broken
