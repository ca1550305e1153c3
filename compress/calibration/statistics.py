"""Second moments of the inputs of a linear, summed in a fixed order so that threads do not change a bit of them.

Chunks are added one after the other, in float32. A matrix is cut into panels of rows by its width alone; a panel is
computed on one thread, and which thread that is does not matter. The second moment is taken in float32, because
rounding it would cost it its positive eigenvalues. The drift is taken in the dtype of the activations: it is a product
with the difference of the inputs, so bfloat16 (accumulated in float32, rounded once per chunk) keeps 2^-9 of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

NARROWEST_PANEL, WIDEST_PANEL = 64, 256


@dataclass(frozen=True, eq=False, slots=True)
class LinearStats:
    """Statistics of the inputs x of one linear, or of several that share the input.

    hessian: (in, in) float32, mean x x^T. drift: (in, in) float32, mean (x' - x) x^T, where x' is the input that the
    original model has for the same token; None where it was not asked for. tokens: how many were seen.
    """

    hessian: Tensor
    drift: Tensor | None
    tokens: int


@dataclass(frozen=True, eq=False, slots=True)
class GroupStats:
    """blocks: (groups, size, size) float32, mean x x^T within each group of inputs; absmean: (in,) mean |x|; tokens."""

    blocks: Tensor
    absmean: Tensor
    tokens: int

    @property
    def square_mean(self) -> Tensor:
        """mean x^2, (in,)."""
        return self.blocks.diagonal(dim1=1, dim2=2).reshape(-1)


def collect(chunks: Sequence[Tensor], originals: Sequence[Tensor] | None, pool: Executor) -> LinearStats:
    """Full statistics over chunks of inputs (tokens, in) each; `originals` holds the x' of the same tokens.

    Zero tokens (an expert that no token reached) give zero matrices.
    """
    width, tokens = chunks[0].shape[-1], sum(chunk.shape[0] for chunk in chunks)
    hessian = torch.zeros(width, width)
    drift = None if originals is None else torch.zeros(width, width)
    height = max(NARROWEST_PANEL, min(WIDEST_PANEL, width // 4))

    for i, x in enumerate(chunks):
        wide = x.float()

        def panel(start: int, i: int = i, x: Tensor = x, wide: Tensor = wide) -> None:
            rows = slice(start, min(start + height, width))
            hessian[rows, start:] += wide[:, rows].T @ wide[:, start:]  # the rest follows by symmetry
            if drift is not None and originals is not None:
                drift[rows] += (originals[i][:, rows] - x[:, rows]).T @ x

        list(pool.map(panel, range(0, width, height)))
    upper = torch.triu(hessian) / max(tokens, 1)
    drift = None if drift is None else drift / max(tokens, 1)
    return LinearStats(upper + torch.triu(upper, 1).T, drift, tokens)


def collect_groups(chunks: Sequence[Tensor], groups: int, pool: Executor) -> GroupStats:
    """Statistics within `groups` equal groups of inputs, over chunks of inputs (tokens, in) each."""
    width, tokens = chunks[0].shape[-1], sum(chunk.shape[0] for chunk in chunks)
    size = width // groups
    blocks = collect(chunks, None, pool).hessian.unsqueeze(0) if groups == 1 else torch.zeros(groups, size, size)
    absmean = torch.zeros(width)
    for chunk in chunks:
        x = chunk.float()
        absmean += x.abs().sum(0)

        def add(group: int, x: Tensor = x) -> None:
            part = x[:, group * size : (group + 1) * size]
            blocks[group] += part.T @ part

        if groups > 1:
            list(pool.map(add, range(groups)))
    if groups > 1:
        blocks /= max(tokens, 1)
    return GroupStats(blocks, absmean / max(tokens, 1), tokens)
