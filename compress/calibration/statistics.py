"""Second moments of the inputs of a linear, summed in a fixed order so that threads do not change a bit of them.

A matrix is cut into panels of rows by its width alone. A panel is summed on one thread, chunk after chunk, in float32;
which thread that is does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels import dispatch

NARROWEST_PANEL, WIDEST_PANEL = 64, 256


@dataclass(frozen=True, eq=False, slots=True)
class Drift:
    """How far the inputs x of a linear are from x', which the original model has for the same tokens.

    difference: mean (x' - x) x^T, hessian: mean x x^T, both (in, in) float32 over the same `tokens` tokens.
    """

    difference: Tensor
    hessian: Tensor
    tokens: int


@dataclass(frozen=True, eq=False, slots=True)
class LinearStats:
    """Statistics of the inputs x of one linear, or of several that share the input.

    hessian: (in, in) float32, mean x x^T over `tokens` tokens. drift: None where it was not asked for.
    """

    hessian: Tensor
    drift: Drift | None
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


def square_mean(chunks: Sequence[Tensor], pool: Executor) -> Tensor:
    """mean x^2, (in,) float32, over chunks of inputs (tokens, in) each; zero of no tokens."""
    sums = list(pool.map(lambda chunk: chunk.float().square().sum(0), chunks))
    total = torch.zeros(chunks[0].shape[-1])
    for part in sums:
        total += part
    return total / max(_tokens(chunks), 1)


def collect(chunks: Sequence[Tensor], originals: Mapping[int, Tensor], pool: Executor) -> LinearStats:
    """Full statistics over chunks of inputs (tokens, in) each.

    originals: the x' of some of the chunks, by their place; the drift is taken over these, and is None without any.
    Zero tokens (an expert that no token reached) give zero matrices.
    """
    width = chunks[0].shape[-1]
    compared = [chunks[place] for place in sorted(originals)]
    total, drift = torch.zeros(width, width), None
    add_second_moment(total, compared, compared, pool)
    if originals:
        seen = _tokens(compared)
        cross = torch.zeros(width, width)
        add_second_moment(cross, [originals[place] for place in sorted(originals)], compared, pool)
        hessian = _mirror(total) / max(seen, 1)
        drift = Drift(cross.div_(max(seen, 1)).sub_(hessian), hessian, seen)
    others = [chunk for place, chunk in enumerate(chunks) if place not in originals]
    add_second_moment(total, others, others, pool)
    tokens = _tokens(chunks)
    return LinearStats(_mirror(total).div_(max(tokens, 1)), drift, tokens)


@dataclass(frozen=True, eq=False, slots=True)
class Means:
    """The mean (in,) float32 of the inputs of a linear: `now`, and `wanted` of those that the original model has."""

    now: Tensor
    wanted: Tensor


def centred(stats: LinearStats, chunks: Sequence[Tensor], originals: Mapping[int, Tensor]) -> tuple[LinearStats, Means]:
    """Statistics about the mean, for a linear whose bias takes up what its inputs are on average, and these means.

    stats: what `collect` gives for the same chunks.
    """
    mean = mean_of(chunks)
    if stats.drift is None:
        return about(stats, mean)
    hessian = stats.hessian - torch.outer(mean, mean)
    places = sorted(originals)
    seen = mean_of([chunks[place] for place in places])
    moved = mean_of([originals[place] for place in places]) - seen
    difference = stats.drift.difference - torch.outer(moved, seen)
    drift = Drift(difference, stats.drift.hessian - torch.outer(seen, seen), stats.drift.tokens)
    return LinearStats(hessian, drift, stats.tokens), Means(mean, mean + moved)


def about(stats: LinearStats, mean: Tensor) -> tuple[LinearStats, Means]:
    """The same where the mean (in,) is known and the original model is not compared with."""
    return LinearStats(stats.hessian - torch.outer(mean, mean), None, stats.tokens), Means(mean, mean)


def mean_of(chunks: Sequence[Tensor]) -> Tensor:
    """The mean of chunks of inputs (tokens, in) each: (in,) float32; zero of no tokens."""
    total = torch.zeros(chunks[0].shape[-1], dtype=torch.float64)
    for chunk in chunks:
        total += chunk.float().sum(0, dtype=torch.float64)
    return (total / max(_tokens(chunks), 1)).float()


def add_second_moment(total: Tensor, left: Sequence[Tensor], right: Sequence[Tensor], pool: Executor) -> None:
    """Adds the sum of l r^T over chunks of tokens (tokens, in) each to total (in, in) float32.

    Where both are the same list, only the upper triangle is summed.
    """
    width = total.shape[0]
    symmetric = left is right
    pairs = [(_operand(a), _operand(b)) for a, b in zip(left, right, strict=True) if a.shape[0]]

    def panel(rows: range) -> None:
        for a, b in pairs:
            dispatch.add_moment(total, a, b, rows, upper=symmetric)

    height = max(NARROWEST_PANEL, min(WIDEST_PANEL, width // 4))
    list(pool.map(panel, (range(start, min(start + height, width)) for start in range(0, width, height))))


def _tokens(chunks: Sequence[Tensor]) -> int:
    return sum(chunk.shape[0] for chunk in chunks)


def _mirror(matrix: Tensor) -> Tensor:
    """Gives a square matrix the lower triangle that its upper one asks for; in place, in blocks that fit a cache."""
    for start in range(0, matrix.shape[0], WIDEST_PANEL):
        end = start + WIDEST_PANEL
        block = matrix[start:end, start:end]
        block.copy_(torch.triu(block) + torch.triu(block, 1).T)
        matrix[end:, start:end] = matrix[start:end, end:].T
    return matrix


def _operand(chunk: Tensor) -> Tensor:
    """As the kernel takes it: float16 is widened, which loses nothing."""
    return (chunk.float() if chunk.dtype == torch.float16 else chunk).contiguous()


def collect_groups(chunks: Sequence[Tensor], groups: int, pool: Executor) -> GroupStats:
    """Statistics within `groups` equal groups of inputs, over chunks of inputs (tokens, in) each."""
    width, tokens = chunks[0].shape[-1], _tokens(chunks)
    size = width // groups
    blocks = collect(chunks, {}, pool).hessian.unsqueeze(0) if groups == 1 else torch.zeros(groups, size, size)
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
