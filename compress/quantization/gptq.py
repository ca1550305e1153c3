"""GPTQ (Frantar et al., arXiv:2210.17323, Algorithm 1) with everything that improves it at no cost in stored bits.

1. Correction. Earlier layers are already quantised, so the inputs x differ from the x' of the original model. The
   float weight that best reproduces W x' from x is W* = W + W D H^-1 with D = mean (x' - x) x^T; the asymmetric
   calibration of GPTAQ (arXiv:2504.02692) in closed form, from a part of the tokens. A linear whose output is added
   to the residual stream also makes up for what the stream r has lost of the original's r': W* = W + (W D + M) H^-1
   with M = mean (r' - r) x^T. GPTQ then quantises W*.
2. Static groups with activation order: scales are fixed on the stored column order, columns are visited by falling
   Hessian diagonal, so nothing but codes and scales is stored.
3. Scales minimise the error that remains after the other columns compensate: a group's error counts by the inverse
   of its diagonal block of H^-1 (the Schur complement).
4. The column loop, with error feedback through U where H^-1 = U^T U (native kernel).
5. Cyclic coordinate descent over the codes on the same objective tr((W* - Q) H (W* - Q)^T), and least-squares
   refits of the scales given the codes; every step can only lower the objective before scale rounding, and the
   best state is kept.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Protocol

import torch
from torch import Tensor

from compress.calibration.statistics import Drift, LinearStats
from compress.kernels import dispatch
from compress.kernels.scales import stored_scale
from compress.quantization.configs import GptqConfig
from compress.quantization.grid import Grid, grouped, min_max_grid, search_grid
from compress.quantization.hessian import Cholesky, Factored, cholesky, damped, factor
from compress.types import IntScheme, QuantizedTensor

SHRINKAGE = 16
ROWS_PER_TASK = 256


class Feedback(Protocol):
    """The settings of error feedback, as methods have them."""

    @property
    def damp_frac(self) -> float: ...

    @property
    def act_order(self) -> bool: ...

    @property
    def correction(self) -> float: ...


class Preconditioner:
    """What the linears that share one input share: the ordered, factored Hessian, and the correction.

    Costs O(in^3) once. `factored` is None where no damping makes the Hessian positive definite, `correction` where
    there is no drift or its Hessian has no factor.
    """

    def __init__(self, stats: LinearStats, config: Feedback, pool: Executor) -> None:
        drift = stats.drift if config.correction else None
        correction = None if drift is None else pool.submit(_correction, drift, config)
        diagonal = stats.hessian.diagonal()
        width = diagonal.shape[0]
        if config.act_order:
            self.order = torch.argsort(diagonal, descending=True, stable=True)
        else:
            self.order = torch.arange(width)
        self.stats = stats
        self.factored: Factored | None = factor(_permuted(stats.hessian, self.order), config.damp_frac)
        self.hessian = damped(stats.hessian, self.factored.damp_frac if self.factored else config.damp_frac)
        self._blocks: dict[int, Tensor] = {}
        self.correction: Correction | None = None if correction is None else correction.result()

    def prepare(self, groups: int, pool: Executor) -> None:
        """Does once what tiles of a weight of so many groups would else do each for themselves."""
        self.inverse_blocks(groups, pool)

    def corrected(self, weight: Tensor, pool: Executor, missed: Tensor | None = None) -> Tensor:
        """What is to be quantised in place of a whole weight (out, in) float32: that itself, or as corrected.

        missed: M (out, in), where the output is added to the residual stream.
        """
        correction = self.correction
        if correction is None:
            return weight
        if weight.shape[0] >= weight.shape[1]:
            correction.expand(pool)
        rows = weight.split(ROWS_PER_TASK)
        lost = [None] * len(rows) if missed is None else missed.split(ROWS_PER_TASK)
        return torch.cat(list(pool.map(correction.corrected, rows, lost)))

    def inverse_blocks(self, groups: int, pool: Executor | None = None) -> Tensor:
        """Inverse of each group's diagonal block of H^-1, in stored column order: (groups, size, size)."""
        if groups not in self._blocks:
            members = torch.argsort(self.order).chunk(groups)
            each = map if pool is None else pool.map
            self._blocks[groups] = torch.stack(list(each(self._inverse_block, members)))
        return self._blocks[groups]

    def _inverse_block(self, columns: Tensor) -> Tensor:
        assert self.factored is not None
        part = self.factored.upper.index_select(1, columns)
        return torch.linalg.inv(part.T @ part)


class Correction:
    """W -> W + W D H^-1, in one of two orders: rows through D and then the factor of H, or through D H^-1 at once.

    The second costs a product for the matrix and saves one on every row, so it wins from as many rows as inputs on.
    `difference` is D times `share`, how much of the drift is corrected.
    """

    def __init__(self, difference: Tensor, factored: Cholesky, share: float = 1.0) -> None:
        self._difference, self._factored, self._share = difference, factored, share
        self._product: Tensor | None = None

    def expand(self, pool: Executor) -> None:
        """Works D H^-1 out, for all rows to come."""
        if self._product is None:
            parts = pool.map(self._factored.divide, self._difference.split(ROWS_PER_TASK))
            self._product = torch.cat(list(parts))

    def corrected(self, weight: Tensor, missed: Tensor | None = None) -> Tensor:
        """The rows (n, in) float32 with which quantised inputs give what the originals gave.

        missed: M (n, in), mean of what these rows' outputs are to make up for besides, times the input.
        """
        if self._product is not None:
            found = torch.addmm(weight, weight, self._product)
            return found if missed is None else found + self._factored.divide(self._share * missed)
        wanted = weight @ self._difference
        return weight + self._factored.divide(wanted if missed is None else wanted.add_(missed, alpha=self._share))


def transform(
    weight: Tensor,
    shared: Preconditioner,
    scheme: IntScheme,
    config: GptqConfig,
    scale_dtype: torch.dtype,
    pruned: Tensor | None = None,
) -> QuantizedTensor:
    """Quantises rows (out, in) float32 of a weight, as `Preconditioner.corrected` gives it; `shared` must be factored.

    Rows do not depend on each other, so a weight may be handed over in tiles. What is `pruned` (out, in) bool becomes
    exactly zero, and the other weights make up for it.
    """
    assert shared.factored is not None
    factored, order = shared.factored, shared.order
    groups = scheme.groups(weight.shape[1])
    stays = weight if pruned is None else weight.masked_fill(pruned, 0.0)
    if config.scale_search:
        grid = search_grid(stays, scheme, scale_dtype, shared.inverse_blocks(groups))
    else:
        grid = min_max_grid(stays, scheme, scale_dtype)
    codes, _ = dispatch.gptq_quantize(
        weight[:, order].contiguous(), factored.upper, grid.scale.float(), _float_zero(grid),
        (order // (weight.shape[1] // groups)).to(torch.int32), scheme.qmin, scheme.qmax, threads=1,
        pruned=None if pruned is None else pruned[:, order],
    )  # fmt: skip
    rows = _Rows(weight, grid, codes[:, torch.argsort(order)].contiguous(), shared.hessian, pruned)
    if config.descent_sweeps:
        rows.descend(config.descent_sweeps)
        for _ in range(config.refit_rounds):
            if not rows.refit(config.descent_sweeps):
                break
    return rows.quantized()


class _Rows:
    """Codes and scales of some rows while they are polished; columns are in stored order."""

    def __init__(self, target: Tensor, grid: Grid, codes: Tensor, hessian: Tensor, pruned: Tensor | None) -> None:
        self.grid, self.codes, self.hessian, self.pruned = grid, codes, hessian, pruned
        self.target, self.scale, self.zero = target, grid.scale, _float_zero(grid)
        width, groups = target.shape[1], grid.scale.shape[1]
        self.group_of_column = torch.arange(width, dtype=torch.int32) // (width // groups)
        self.gradient = (target - self._dense(self.scale)) @ hessian

    def descend(self, sweeps: int) -> None:
        """Coordinate descent from `gradient` = (target - dense) @ hessian, which it keeps."""
        dispatch.coordinate_descent(
            self.gradient, self.hessian, self.scale.float(), self.zero, self.group_of_column,
            self.grid.scheme.qmin, self.grid.scheme.qmax, self.codes, sweeps, threads=1, pruned=self.pruned,
        )  # fmt: skip
        self.loss = (self.gradient * (self.target - self._dense(self.scale))).sum(1)

    def refit(self, sweeps: int) -> bool:
        """Refits scales, then descends; rows that got worse are put back. Whether any row improved."""
        scale, codes, loss = self.scale, self.codes.clone(), self.loss
        self.scale, self.gradient = self._least_squares()
        self.descend(sweeps)
        worse = ~(self.loss < loss)
        self.scale = torch.where(worse.unsqueeze(1), scale, self.scale)
        self.codes[worse] = codes[worse]
        self.loss = torch.where(worse, loss, self.loss)
        return not bool(worse.all())

    def quantized(self) -> QuantizedTensor:
        return QuantizedTensor(self.codes, self.scale, self.grid.zero_point, self.grid.scheme)

    def _levels(self) -> Tensor:
        """codes - zero_point as (out, groups, group_size)."""
        return grouped(self.codes.float(), self.grid.scheme) - self.zero.unsqueeze(-1)

    def _dense(self, scale: Tensor) -> Tensor:
        return (self._levels() * scale.float().unsqueeze(-1)).reshape(self.codes.shape)

    def _least_squares(self) -> tuple[Tensor, Tensor]:
        """argmin over scales of the objective with the codes held, one (groups, groups) system per row.

        Returns the scales as stored, and the gradient that belongs to them. Solved for the change of the scales,
        whose right-hand side the gradient gives.
        """
        levels = self._levels()
        out, groups, size = levels.shape
        through = torch.bmm(levels.transpose(0, 1), self.hessian.reshape(groups, size, -1))
        normal = torch.stack(
            [(part.reshape(out, groups, size) * levels).sum(-1) for part in through.unbind(0)], dim=1
        )  # fmt: skip
        right = (levels * grouped(self.gradient, self.grid.scheme)).sum(-1)
        ridge = normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-20) * 1e-6
        normal += ridge.reshape(-1, 1, 1) * torch.eye(groups)
        change, info = torch.linalg.solve_ex(normal, right.unsqueeze(-1))
        usable = (info == 0) & torch.isfinite(change).all(dim=(1, 2))
        before = self.scale.float()
        wanted = torch.where(usable.unsqueeze(1), before + change.squeeze(-1), before)
        scale = stored_scale(wanted, self.scale.dtype, self.grid.reach)
        moved = scale.float() - before
        gradient = self.gradient.clone()
        for group, part in enumerate(through.unbind(0)):
            gradient.addcmul_(part, moved[:, group, None], value=-1)
        return scale, gradient


def _float_zero(grid: Grid) -> Tensor:
    return torch.zeros(grid.scale.shape) if grid.zero_point is None else grid.zero_point.float()


def _correction(drift: Drift, config: Feedback) -> Correction | None:
    """None where the Hessian has no factor.

    D and H are over the same tokens, so that what these tokens have too much or too little of cancels. The drift is an
    estimate from n tokens in as many dimensions as the linear has inputs; taken at face value from few tokens it fits
    their noise, so it is shrunk by n / (n + SHRINKAGE * in).
    """
    factored = cholesky(drift.hessian, config.damp_frac)
    if factored is None:
        return None
    share = config.correction * drift.tokens / (drift.tokens + SHRINKAGE * drift.hessian.shape[0])
    return Correction(share * drift.difference, factored, share)


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    return matrix.index_select(0, order).index_select(1, order)
