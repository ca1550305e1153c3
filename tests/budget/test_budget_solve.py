"""The choice of options: optimal against every combination, refused where there is none."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import pytest

from compress.workflows.budget import solve
from compress.workflows.budget.solve import least_bits, least_loss

Rows = list[list[float]]


def problem(seed: int, units: int = 5, options: int = 5, scale: float = 1.0) -> tuple[list[list[int]], Rows]:
    """Bits and losses over several orders of magnitude; bits rise, losses need not fall."""
    draw = random.Random(seed)
    bits = [sorted(draw.randrange(1, 10**6) for _ in range(draw.randint(1, options))) for _ in range(units)]
    losses = [[scale * 10 ** draw.uniform(-7, 0) for _ in row] for row in bits]
    return bits, losses


def picked(rows: Rows | list[list[int]], places: tuple[int, ...] | list[int]) -> float:
    return sum(row[place] for row, place in zip(rows, places, strict=True))


def every(rows: list[list[int]]) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(len(row)) for row in rows))


@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize("seed", range(6))
def test_the_least_loss_within_bits_is_that_of_all_combinations(seed: int, scale: float) -> None:
    bits, losses = problem(seed, scale=scale)
    totals = sorted(picked(bits, places) for places in every(bits))
    for budget in (totals[0], totals[len(totals) // 3], totals[len(totals) // 2] + 1, totals[-1] + 5):
        chosen = least_loss(bits, losses, int(budget))
        assert chosen is not None
        assert picked(bits, chosen) <= budget
        best = min(picked(losses, places) for places in every(bits) if picked(bits, places) <= budget)
        assert picked(losses, chosen) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_fewest_bits_within_a_loss_are_those_of_all_combinations(seed: int) -> None:
    bits, losses = problem(seed)
    totals = sorted(picked(losses, places) for places in every(bits))
    for limit in (totals[0], totals[len(totals) // 2], totals[-1]):
        chosen = least_bits(bits, losses, limit)
        assert chosen is not None
        assert picked(losses, chosen) <= limit
        assert picked(bits, chosen) == min(picked(bits, p) for p in every(bits) if picked(losses, p) <= limit)


def test_what_cannot_be_met_has_no_choice() -> None:
    bits, losses = [[10, 20], [5, 7]], [[1.0, 0.5], [1.0, 0.1]]
    assert least_loss(bits, losses, 14) is None
    assert least_loss(bits, losses, 15) == [0, 0]
    assert least_bits(bits, losses, 0.59) is None
    assert least_bits(bits, losses, 0.6) == [1, 1]


def test_of_equal_losses_the_fewer_bits_are_taken_and_the_choice_is_always_the_same() -> None:
    bits, losses = [[10, 20, 30]] * 6, [[0.5, 0.5, 0.0]] * 6
    chosen = least_loss(bits, losses, 6 * 30 - 20)
    assert chosen is not None
    assert sorted(chosen) == [0, 2, 2, 2, 2, 2]
    assert all(least_loss(bits, losses, 160) == chosen for _ in range(3))


def test_what_the_solver_says_does_not_reach_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = solve.milp

    def talkative(*arguments: Any, **options: Any) -> Any:
        os.write(1, b"HighsMipSolverData")
        return real(*arguments, **options)

    monkeypatch.setattr(solve, "milp", talkative)
    print("before")
    assert least_loss([[10, 20]], [[1.0, 0.5]], 15) == [0]
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
