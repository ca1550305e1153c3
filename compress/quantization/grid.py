"""Integer grids: from a range to scale and zero point, from a weight to codes, and the search for the best range.

Symmetric grids use amax / ((2^b - 1) / 2) with all 2^b codes (the 7.5 grid at 4 bits), because amax / (2^(b-1) - 1)
leaves one code unused. The search may also turn a symmetric scale negative, which hands the extra code -2^(b-1) to
whichever side of zero reaches further; a kernel that multiplies by the scale reads it unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels import dispatch
from compress.kernels.scales import stored_scale
from compress.types import IntScheme, QuantizedTensor

COARSE_STEP = 0.06
FINE_OFFSETS = (-0.04, -0.02, 0.02, 0.04)
# The coarser the grid, the more range it pays to give up for finer steps.
LOWEST_SHRINK = {2: 0.40, 3: 0.52, 4: 0.64, 5: 0.76, 6: 0.82, 7: 0.88, 8: 0.94}


@dataclass(frozen=True, eq=False, slots=True)
class Grid:
    """scale (out, groups) in its stored dtype; zero_point (out, groups) int8, None when symmetric."""

    scale: Tensor
    zero_point: Tensor | None
    scheme: IntScheme

    @property
    def reach(self) -> Tensor | int:
        """The largest |code - zero point|: (out, groups), or one number for all when symmetric."""
        return -self.scheme.qmin if self.zero_point is None else _reach(self.zero_point, self.scheme)

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes (out, in) int8 of weight (out, in) float32."""
        groups = grouped(weight, self.scheme)
        return self.codes(groups).to(torch.int8).reshape(weight.shape)

    def codes(self, groups: Tensor) -> Tensor:
        """Nearest codes, as floats, of groups (out, groups, group_size) float32."""
        codes = torch.round(groups / self.scale.float().unsqueeze(-1))
        if self.zero_point is not None:
            codes += self.zero_point.unsqueeze(-1)
        return codes.clamp_(self.scheme.qmin, self.scheme.qmax)


def grouped(weight: Tensor, scheme: IntScheme) -> Tensor:
    """View of weight (out, in) as (out, groups, group_size)."""
    out, width = weight.shape
    return weight.reshape(out, scheme.groups(width), -1)


def min_max_grid(weight: Tensor, scheme: IntScheme, dtype: torch.dtype) -> Grid:
    """The grid that covers each group's whole range. weight: (out, in) float32."""
    groups = grouped(weight, scheme)
    return _grid(groups, scheme, dtype, torch.ones(()), 1.0)


def search_grid(weight: Tensor, scheme: IntScheme, dtype: torch.dtype, importance: Tensor | None = None) -> Grid:
    """The grid whose rounding error weighs least, among shrunken ranges of each group (and both signs of the scale).

    Args:
        weight: (out, in) float32.
        importance: (groups, group_size, group_size) float32, the quadratic form by which a group's error counts,
            such as the Hessian's diagonal blocks; None counts squared weight error.
    """
    steps = round((1.0 - LOWEST_SHRINK[scheme.bits]) / COARSE_STEP)
    shares = [1.0 - step * COARSE_STEP for step in range(steps + 1)]
    groups = grouped(weight, scheme)
    share, sign = dispatch.search_range(
        weight, importance, shares, FINE_OFFSETS, groups.shape[2], scheme.bits, scheme.symmetric, dtype, threads=1
    )
    return _grid(groups, scheme, dtype, share, sign)


def _grid(groups: Tensor, scheme: IntScheme, dtype: torch.dtype, shrink: Tensor, sign: Tensor | float) -> Grid:
    """Grid over `shrink` times each group's range; groups (out, groups, group_size), shrink (out, groups)."""
    levels = 2**scheme.bits - 1
    if scheme.symmetric:
        span = groups.abs().amax(-1) * shrink
        return Grid(stored_scale(span / (levels / 2) * sign, dtype, -scheme.qmin), None, scheme)
    low = groups.amin(-1).clamp(max=0) * shrink
    high = groups.amax(-1).clamp(min=0) * shrink
    scale = stored_scale((high - low) / levels, dtype, -scheme.qmin)
    zero = (torch.round(-low / scale.float()).clamp_(0, levels) + scheme.qmin).to(torch.int8)
    return Grid(stored_scale(scale.float(), dtype, _reach(zero, scheme)), zero, scheme)


def _reach(zero_point: Tensor, scheme: IntScheme) -> Tensor:
    zero = zero_point.float()
    return torch.maximum(zero - scheme.qmin, scheme.qmax - zero)


def quantize(weight: Tensor, grid: Grid) -> QuantizedTensor:
    """Round to nearest on `grid`. weight: (out, in) float32."""
    return QuantizedTensor(grid.encode(weight), grid.scale, grid.zero_point, grid.scheme)
