"""AutoRound (Cheng et al., arXiv:2309.05516): which way each weight is rounded, and each group's range, are learnt.

A code is round(w / s + v), clipped, with an offset v for every weight that begins at 0 and moves by the sign of its
gradient, in steps that fall to zero and add up to half a code. So does the range of every group. The gradient of the
rounding is taken as if it were none (straight-through); it is handed over as that of the dense weight, so that whoever
computes the loss runs on plain dense weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compress.calibration.batches import batches
from compress.kernels.scales import stored_scale
from compress.quantization.configs import AutoRoundConfig
from compress.quantization.grid import Grid, grouped
from compress.types import QuantizedTensor

NARROWEST, WIDEST = 0.5, 1.5
"""How far a group's range may move, as shares of where it began."""


class TunedRounding:
    """One weight (out, in) float32 on its way to codes, beginning as rounded to nearest on `grid`.

    Weights that are exactly 0 stay so. `offset` (out, in) is what rounding adds in codes, `ends` (2, out, groups) the
    factors of each range's lower and upper end (symmetric: only the second counts); all float32.
    """

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self._scheme, self._dtype = grid.scheme, grid.scale.dtype
        self._weight = grouped(weight, grid.scheme)
        self._zeros = self._weight == 0
        scale = grid.scale.float()
        zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.float()
        self._low, self._high = (self._scheme.qmin - zero) * scale, (self._scheme.qmax - zero) * scale
        self._start = scale
        self.offset = torch.zeros(weight.shape)
        self.ends = torch.ones(2, *scale.shape)

    def grid(self) -> Grid:
        """The grid as it would be stored now."""
        if self._scheme.symmetric:
            return Grid(stored_scale(self._start * self.ends[1], self._dtype, -self._scheme.qmin), None, self._scheme)
        low, high = self._low * self.ends[0], self._high * self.ends[1]
        span = self._scheme.qmax - self._scheme.qmin
        scale = stored_scale((high - low) / span, self._dtype, span)
        zero = torch.round(-low / scale.float()).clamp_(0, span) + self._scheme.qmin
        return Grid(scale, zero.to(torch.int8), self._scheme)

    def quantized(self) -> QuantizedTensor:
        """The weight as it would be stored now."""
        grid = self.grid()
        codes = self._unclipped(grid).clamp_(self._scheme.qmin, self._scheme.qmax).to(torch.int8)
        return QuantizedTensor(codes.reshape(self.offset.shape), grid.scale, grid.zero_point, self._scheme)

    def step(self, gradient: Tensor, rate: float, range_rate: float) -> None:
        """Moves everything by the sign of its gradient, given that of the dense weight (out, in) float32."""
        grid, qmin, qmax = self.grid(), self._scheme.qmin, self._scheme.qmax
        scale, pull = grid.scale.float(), grouped(gradient, self._scheme)
        codes = self._unclipped(grid)
        clipped = (codes < qmin) | (codes > qmax)
        inside = pull.masked_fill(clipped | self._zeros, 0.0)
        # d dense / d offset is the scale inside the range, and 0 where it is clipped.
        moved = (inside * scale.unsqueeze(-1)).sign_().reshape(self.offset.shape)
        levels = codes.clamp_(qmin, qmax)
        if grid.zero_point is not None:
            levels -= grid.zero_point.float().unsqueeze(-1)
        by_scale = (pull * levels).sum(-1) - (inside * self._weight).sum(-1) / scale
        self.offset.sub_(moved, alpha=rate)
        self.ends.sub_(
            self._by_ends(by_scale, pull.masked_fill(~clipped, 0.0).sum(-1), scale).sign_(), alpha=range_rate
        )
        self.ends.clamp_(NARROWEST, WIDEST)

    def _by_ends(self, by_scale: Tensor, outside: Tensor, scale: Tensor) -> Tensor:
        """The gradient of `ends`; by_scale: of the scale with the zero point held, outside: summed where clipped."""
        if self._scheme.symmetric:
            return torch.stack([torch.zeros_like(by_scale), by_scale * self._start])
        span = self._scheme.qmax - self._scheme.qmin
        low = self._low * self.ends[0]
        by_zero = -scale * outside  # what is inside its range does not feel the zero point
        by_low = -(by_scale + by_zero * low / scale.square()) / span - by_zero / scale
        by_high = (by_scale + by_zero * low / scale.square()) / span
        return torch.stack([by_low * self._low, by_high * self._high])

    def _unclipped(self, grid: Grid) -> Tensor:
        """Codes (out, groups, group_size) as floats, where the range ends nothing."""
        codes = self._weight / grid.scale.float().unsqueeze(-1)
        codes = (codes + grouped(self.offset, self._scheme)).round_()
        return codes if grid.zero_point is None else codes + grid.zero_point.float().unsqueeze(-1)

    def state(self) -> tuple[Tensor, Tensor]:
        """Copies of what moves."""
        return self.offset.clone(), self.ends.clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Puts back what `state` gave."""
        self.offset.copy_(state[0])
        self.ends.copy_(state[1])


def tune(
    weights: Sequence[TunedRounding],
    learn: Callable[[Sequence[int]], Sequence[Tensor]],
    measure: Callable[[], float],
    learning: Sequence[int],
    config: AutoRoundConfig,
    seed: int,
    advance: Callable[[], None],
) -> tuple[float, float]:
    """Takes all steps and leaves the weights in their best state; the measured loss at first, and of that state.

    Args:
        learn: from the windows of a step, the loss's gradients (out, in) float32 of the dense weights, as they are.
        measure: the loss that decides, on text that teaches nothing; the state at first counts too.
        learning: the windows to draw from.
        advance: called after every step, when the weights have moved.
    """
    drawn = batches(learning, config.windows, seed)
    first = best = measure()
    kept = [weight.state() for weight in weights]
    every = max(1, config.steps // config.checks)
    for step in range(config.steps):
        share = 2 / config.steps * (1 - step / config.steps)  # these add up to 1
        for weight, gradient in zip(weights, learn(next(drawn)), strict=True):
            weight.step(gradient, config.reach * share, config.range_reach * share)
        advance()
        if (step + 1) % every == 0 or step + 1 == config.steps:
            found = measure()
            if found < best:
                best, kept = found, [weight.state() for weight in weights]
    for weight, state in zip(weights, kept, strict=True):
        weight.restore(state)
    advance()
    return first, best
