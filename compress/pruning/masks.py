"""From scores to masks: which weights go so that a sparsity is met exactly."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compress.types import Sparsity

SPARSE = 0.05
"""A weight with at least this share of exact zeros was pruned; trained ones have a few by chance at most."""

Scope = Literal["row", "matrix"]
"""Among which weights scores are compared where the sparsity has no pattern."""


def lowest(scores: Tensor, sparsity: Sparsity, scope: Scope) -> Tensor:
    """The weights that go, (out, in) bool: those of the lowest scores (out, in) float32, of equal ones the first.

    With a pattern, of every `of` consecutive inputs of a row; else of every row, or of the matrix.
    """
    rows, width = scores.shape
    if sparsity.of is not None:
        assert sparsity.kept is not None
        grouped = scores.reshape(-1, sparsity.of)
        return least(grouped, sparsity.of - sparsity.kept).reshape(rows, width)
    if scope == "row":
        return least(scores, round(width * sparsity.share))
    return least(scores.reshape(1, -1), round(scores.numel() * sparsity.share)).reshape(rows, width)


def least(scores: Tensor, count: int) -> Tensor:
    """Marks exactly `count` of the lowest scores in every row of (rows, width), of equal ones the first."""
    if count <= 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    missing = count - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1) <= missing))


def zero_mask(weight: Tensor, recorded: bool = False) -> Tensor | None:
    """Where a pruned weight is exactly zero, bool of its shape; None of a weight that was not pruned.

    recorded: whether it is known to be pruned; then every zero counts, however few.
    """
    zeros = weight == 0
    return zeros if int(zeros.sum()) >= (1 if recorded else SPARSE * weight.numel()) else None
