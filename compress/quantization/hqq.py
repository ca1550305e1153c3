"""HQQ: half-quadratic quantisation (Badri and Shaji 2023, mobiusml.github.io/hqq_blog); data-free.

A weight's error counts by its p-th power with p < 1, which forgives the few large errors of outliers. The objective
sum |W - D(Q(W))|^p is split by an auxiliary E: E takes the large errors (the generalised soft threshold, equation 5),
and the grid is fitted in least squares to W - E, in turns, while E is tied ever closer.

Three things differ from the blog. Errors are measured in steps of the grid, so that one threshold serves weights of any
size. Scales are fitted with the zero points, not kept: the zero points of `pack-quantized` are integers, which alone
leave little to fit (the blog's are floats). And each group keeps the best state that it has seen, its start included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.scales import stored_scale
from compress.quantization.configs import HqqConfig
from compress.quantization.grid import Grid, grouped, min_max_grid, quantize, search_grid
from compress.types import IntScheme, QuantizedTensor


def transform(weight: Tensor, scheme: IntScheme, config: HqqConfig, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Quantises one weight (out, in) float32; rows and groups do not depend on each other."""
    best = (search_grid if config.scale_search else min_max_grid)(weight, scheme, scale_dtype)
    groups = grouped(weight, scheme)
    least, grid, beta = _loss(groups, best, config.p), best, config.beta
    for _ in range(config.steps):
        grid = _fitted(groups, grid, config.p, beta)
        beta *= config.kappa
        loss = _loss(groups, grid, config.p)
        better = loss < least
        best = _chosen(better, grid, best)
        least = torch.where(better, loss, least)
    return quantize(weight, best)


def _fitted(groups: Tensor, grid: Grid, p: float, beta: float) -> Grid:
    """The grid that fits groups (out, groups, group_size) best in least squares, large errors left out."""
    scale = grid.scale.float().unsqueeze(-1)
    codes = grid.codes(groups)
    zero = 0.0 if grid.zero_point is None else grid.zero_point.float().unsqueeze(-1)
    levels = codes - zero
    error = groups / scale - levels
    kept = error.sign() * (error.abs() - error.abs().clamp(min=1e-6) ** (p - 1) / beta).clamp(min=0)
    target = groups - kept * scale
    if grid.zero_point is None:
        fitted = (target * codes).sum(-1) / codes.square().sum(-1)
        wanted = torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, scale.squeeze(-1))
        return Grid(stored_scale(wanted, grid.scale.dtype, grid.reach), None, grid.scheme)
    centred = codes - codes.mean(-1, keepdim=True)
    fitted = (target * centred).sum(-1) / centred.square().sum(-1)
    wanted = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale.squeeze(-1))
    offset = (codes - target / wanted.unsqueeze(-1)).mean(-1)
    rounded = torch.round(offset).clamp(grid.scheme.qmin, grid.scheme.qmax)
    moved = Grid(grid.scale, rounded.to(torch.int8), grid.scheme)
    # With the zero point rounded, the scale is fitted once more through it.
    levels = codes - rounded.unsqueeze(-1)
    slope = (target * levels).sum(-1) / levels.square().sum(-1)
    wanted = torch.where(torch.isfinite(slope) & (slope > 0), slope, wanted)
    return Grid(stored_scale(wanted, grid.scale.dtype, moved.reach), moved.zero_point, grid.scheme)


def _loss(groups: Tensor, grid: Grid, p: float) -> Tensor:
    """sum |W - D(Q(W))|^p of every group: (out, groups)."""
    zero = 0.0 if grid.zero_point is None else grid.zero_point.float().unsqueeze(-1)
    dense = (grid.codes(groups) - zero) * grid.scale.float().unsqueeze(-1)
    return (groups - dense).abs().pow(p).sum(-1)


def _chosen(first: Tensor, one: Grid, other: Grid) -> Grid:
    """`one` where `first` (out, groups) holds, else `other`."""
    zero = None
    if one.zero_point is not None and other.zero_point is not None:
        zero = torch.where(first, one.zero_point, other.zero_point)
    return Grid(torch.where(first, one.scale, other.scale), zero, one.scheme)
