"""The choice itself: one option for each unit, the least loss under a budget or the least bits under a loss.

A multiple-choice knapsack, solved to proven optimality as a mixed-integer program by HiGHS (scipy.optimize.milp).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]

from compress.errors import WorkError

SPREAD = 1e4
"""What the dearest objective is scaled to: HiGHS stops at an absolute gap of 1e-6, which must mean nothing."""


def least_loss(bits: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """The place of the option of each unit with the least summed loss among those of at most `budget` bits.

    None where even the fewest bits are more than the budget. Of equal losses within a unit the fewer bits win.
    """
    return _least(losses, bits, budget, _undominated(bits, losses))


def least_bits(bits: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: float) -> list[int] | None:
    """The place of the option of each unit with the fewest summed bits among those of at most `limit` loss.

    None where even the least losses are more than the limit.
    """
    return _least(bits, losses, limit, _undominated(bits, losses))


def _least(
    objective: Sequence[Sequence[float]], used: Sequence[Sequence[float]], limit: float, kept: list[list[int]]
) -> list[int] | None:
    """Minimises the summed objective with the summed use at most `limit`; of each unit only the places `kept`."""
    if sum(min(row) for row in used) > limit:
        return None
    allowed = limit
    while True:
        chosen = _solve(_picked(objective, kept), _picked(used, kept), allowed)
        places = [row[place] for row, place in zip(kept, chosen, strict=True)]
        total = sum(row[place] for row, place in zip(used, places, strict=True))
        if total <= limit:
            return places
        allowed -= 2 * (total - limit)  # the solver's own tolerance let it slip over the edge


def _undominated(bits: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> list[list[int]]:
    """Of each unit the places of the options that no other beats in both, by rising bits."""
    found = []
    for sizes, lost in zip(bits, losses, strict=True):
        kept: list[int] = []
        for place in sorted(range(len(sizes)), key=lambda i: (sizes[i], lost[i])):
            if not kept or lost[place] < lost[kept[-1]]:
                kept.append(place)
        found.append(kept)
    return found


def _picked(rows: Sequence[Sequence[float]], kept: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
    return [np.array([row[place] for place in places], float) for row, places in zip(rows, kept, strict=True)]


def _solve(objective: Sequence[NDArray[np.float64]], used: Sequence[NDArray[np.float64]], limit: float) -> list[int]:
    """Minimises the summed objective with the summed use at most `limit`; one choice per unit."""
    flat, use = np.concatenate(objective), np.concatenate(used)
    owner = np.repeat(np.arange(len(objective)), [len(row) for row in objective])
    one_each = (owner == np.arange(len(objective))[:, None]).astype(float)
    scale = SPREAD / (float(np.abs(flat).max()) or 1.0)
    unit = float(use.max()) or 1.0
    with _silent():
        result = milp(
            flat * scale,
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(use[None] / unit, -np.inf, limit / unit)],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        raise WorkError(f"the solver found no choice: {result.message}", "please report this with the recipe")
    starts = np.cumsum([0, *(len(row) for row in objective)])
    return [int(result.x[a:b].argmax()) for a, b in pairwise(starts)]


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS writes a line to the process's standard output now and then, whatever it is told; results belong there."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(nothing)
        os.close(kept)
