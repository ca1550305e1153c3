"""Which inputs stay, and the repair of what they feed: against brute force in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.pruning import width
from tests.kernels.problems import make


def loss(weight: torch.Tensor, narrow: torch.Tensor, kept: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W - W') H (W - W')^T) with W' zero where inputs went."""
    error = weight.double().clone()
    error[:, kept] -= narrow.double()
    return float((error @ hessian.double() * error).sum())


def test_the_repair_is_least_squares() -> None:
    problem = make(6, 24, 1)
    kept = torch.tensor([0, 3, 4, 9, 11, 20])
    found = width.repaired(problem.weight, problem.hessian, kept)
    hessian, weight = problem.hessian.double(), problem.weight.double()
    wanted = weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-5)
    assert loss(weight, found, kept, hessian) < 0.9 * loss(weight, weight[:, kept], kept, hessian)


def test_nothing_lost_is_nothing_changed() -> None:
    problem = make(6, 24, 1)
    found = width.repaired(problem.weight, problem.hessian, torch.arange(24))
    torch.testing.assert_close(found, problem.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_removing_one_group_takes_the_one_that_costs_least(size: int) -> None:
    problem = make(5, 12 * size, 1)
    kept = width.survivors(problem.weight, problem.hessian, 1, size, 11)
    losses = []
    for gone in range(12):
        stays = torch.cat([torch.arange(g * size, (g + 1) * size) for g in range(12) if g != gone])
        narrow = width.repaired(problem.weight, problem.hessian, stays)
        losses.append(loss(problem.weight, narrow, stays, problem.hessian))
    assert sorted(set(range(12)) - set(kept.tolist())) == [losses.index(min(losses))]


def test_the_rounds_come_close_to_the_best_subset() -> None:
    problem = make(4, 10, 1, seed=3)
    found = width.survivors(problem.weight, problem.hessian, 1, 1, 5)
    best = {}
    for subset in itertools.combinations(range(10), 5):
        kept = torch.tensor(subset)
        best[subset] = loss(
            problem.weight, width.repaired(problem.weight, problem.hessian, kept), kept, problem.hessian
        )
    assert best[tuple(found.tolist())] <= 1.1 * min(best.values())


def test_every_section_keeps_as_many() -> None:
    problem = make(9, 48, 1)
    kept = width.survivors(problem.weight, problem.hessian, 4, 3, 2)  # 4 sections of 4 groups of 3 inputs
    assert len(kept) == 8
    assert (kept // 4).bincount().tolist() == [2, 2, 2, 2]
    assert kept.tolist() == sorted(kept.tolist())
    assert width.survivors(problem.weight, problem.hessian, 4, 3, 4).tolist() == list(range(16))
