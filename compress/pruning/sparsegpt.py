"""SparseGPT (Frantar and Alistarh, arXiv:2301.00774, Algorithm 1), and a refit of what stays.

Columns are visited in blocks. In each block the mask is chosen by what a removal costs after the columns behind it have
compensated, w^2 / U_jj^2 with H^-1 = U^T U; then the block's removals correct the columns after them (native kernel)
and those after the block (one product). A pattern n:m chooses group by group on the weights as corrected so far.

The column loop lets only later columns compensate. With the mask settled, the best values of all weights that stay
are those of least squares, min tr((W - Q) H (W - Q)^T) over the support of Q: conjugate gradients on all rows at once
find them from the loop's result, and a row whose error did not fall keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

import torch
from torch import Tensor

from compress.kernels import dispatch
from compress.pruning.masks import least
from compress.types import Sparsity

BLOCK_COLUMNS = 128
ROWS_PER_TILE = 128


def prune(
    weight: Tensor, upper: Tensor, order: Tensor, sparsity: Sparsity, pool: Executor, gone: Tensor | None = None
) -> Tensor:
    """SparseGPT's result (out, in) float32, exactly as sparse as asked, zeros where pruned.

    Sparser only where more than that is `gone` already, or gone in other places than a pattern leaves.

    Args:
        weight: (out, in) float32, not modified.
        upper: (in, in) float32, the upper Cholesky factor U of the inverse Hessian in `order`.
        order: (in,) int64, in which the columns are visited; as stored where the sparsity has a pattern.
        gone: (out, in) bool, what must be zero whatever it would cost.
    """
    tiles = [tile[:, order].contiguous() for tile in weight.split(ROWS_PER_TILE)]
    width = weight.shape[1]
    step = BLOCK_COLUMNS if sparsity.of is None else sparsity.of * max(1, BLOCK_COLUMNS // sparsity.of)
    earlier = None if gone is None else gone[:, order]
    count = 0
    for begin in range(0, width, step):
        end = min(begin + step, width)
        corner = upper[begin:end, begin:end].contiguous()
        chosen: list[Tensor | None] = [None] * len(tiles)
        if sparsity.of is None:
            scores = torch.cat([tile[:, begin:end] for tile in tiles]) / corner.diagonal()
            due = round(weight.shape[0] * end * sparsity.share) - count
            scores.square_()
            if earlier is not None:
                scores.masked_fill_(earlier[:, begin:end], -1.0)
            marked = least(scores.reshape(1, -1), due).reshape(scores.shape)
            if earlier is not None:
                marked |= earlier[:, begin:end]
            count += int(marked.sum())
            chosen = list(marked.to(torch.int8).split(ROWS_PER_TILE))
        list(pool.map(_corrector(begin, end, corner, upper, sparsity), tiles, chosen))
    back = torch.argsort(order)
    found = torch.cat([tile[:, back] for tile in tiles])
    return found if gone is None else found.masked_fill_(gone, 0.0)


def _corrector(
    begin: int, end: int, corner: Tensor, upper: Tensor, sparsity: Sparsity
) -> Callable[[Tensor, Tensor | None], None]:
    """Takes one tile of rows through one block of columns, in place."""
    group = sparsity.of or 0
    drop = group - (sparsity.kept or 0)

    def correct(tile: Tensor, chosen: Tensor | None) -> None:
        block = tile[:, begin:end].contiguous()
        pruned = torch.empty(block.shape, dtype=torch.int8) if chosen is None else chosen.contiguous()
        errors = dispatch.prune_columns(block, corner, pruned, group, drop, threads=1)
        tile[:, begin:end] = block
        if end < tile.shape[1]:
            tile[:, end:] -= errors @ upper[begin:end, end:]

    return correct


def refit(target: Tensor, pruned: Tensor, hessian: Tensor, steps: int, pool: Executor) -> Tensor:
    """Least-squares values of what stays: Q (out, in) float32 with Q = 0 wherever `pruned` is 0.

    target (out, in): the weight whose outputs are wanted. hessian (in, in), damped. steps: of conjugate gradients.
    """
    if not steps:
        return pruned
    tiles = pool.map(
        lambda wanted, start: _conjugate_gradients(wanted, start, hessian, steps),
        target.split(ROWS_PER_TILE), pruned.split(ROWS_PER_TILE),
    )  # fmt: skip
    return torch.cat(list(tiles))


def _conjugate_gradients(target: Tensor, start: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Every row on its own support, preconditioned by the diagonal; rows that got worse go back to `start`."""
    stays = (start != 0).float()
    inverse = stays / hessian.diagonal()
    found = start.clone()
    gradient = (target - found) @ hessian
    before = ((target - found) * gradient).sum(1)
    residual = gradient * stays
    direction = residual * inverse
    slope = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        through = (direction @ hessian) * stays
        length = slope / (direction * through).sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        found += length * direction
        residual -= length * through
        scaled = residual * inverse
        steeper = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + (steeper / slope.clamp(min=torch.finfo(torch.float32).tiny)) * direction
        slope = steeper
    after = ((target - found) @ hessian * (target - found)).sum(1)
    better = torch.isfinite(after) & (after < before)
    return torch.where(better.unsqueeze(1), found, start)
