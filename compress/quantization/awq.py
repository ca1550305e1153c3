"""AWQ: activation-aware weight quantisation (Lin et al., arXiv:2306.00978).

Input channels that carry large activations matter more. Multiplying their weights by s > 1 and dividing what feeds
them by s leaves the float model as it was and gives those weights finer steps relative to their size. Section 3.2: s is
searched per edge (producer -> consumers) on a grid of exponents, by the output error of the consumers after rounding.
Section 3.3's clip search follows, per group.

Two things differ from the paper. The output error is taken as sum_j E[x_j^2] ||dW_j||^2, its expectation for rounding
errors that are independent between channels: one fused pass over the weight per candidate instead of a forward pass.
The identity is always a candidate, and a scale is used only if it is strictly better.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels import dispatch
from compress.quantization.configs import AwqConfig
from compress.quantization.grid import min_max_grid, quantize, search_grid
from compress.types import IntScheme, QuantizedTensor

ROWS_PER_TASK = 256
CLIPPED_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)


@dataclass(frozen=True, eq=False, slots=True)
class Scaling:
    """Result of one edge's search: scale (in,) float32, or None where the identity won; losses for the report."""

    scale: Tensor | None
    exponent: float
    duo: bool
    loss: float
    identity_loss: float


def search_scale(
    weights: Mapping[str, Tensor],
    square_means: Mapping[str, Tensor],
    absmean: Tensor,
    schemes: Mapping[str, IntScheme],
    config: AwqConfig,
    pool: Executor,
    *,
    powers_of_two: bool = False,
) -> Scaling:
    """Searches the scale of one edge.

    Args:
        weights: the consumers that will be quantised, (out, in) float32 each.
        square_means: E[x_j^2] (in,) of each consumer's inputs.
        absmean: mean |x_j| (in,) of the inputs that the consumers share.
        schemes: of each consumer; the first one's groups say how large a weight is beside its neighbours.
        powers_of_two: search only scales that move through floats without rounding them.
    """
    first = schemes[next(iter(weights))]
    candidates = _candidates(list(weights.values()), absmean, first, config, powers_of_two)
    scales = torch.stack([scale for _, _, scale in candidates])
    # Where clipping follows, a scale must be worth it on clipped grids, or it only does what clipping does anyway.
    shares = CLIPPED_SHARES if config.clip else (1.0,)

    def loss(task: tuple[Tensor, Tensor, IntScheme]) -> Tensor:
        rows, importance, scheme = task
        group_size = scheme.group_size or rows.shape[1]
        return dispatch.rounding_loss(
            rows, scales, importance, shares, group_size, scheme.bits, scheme.symmetric, threads=1
        )  # fmt: skip

    tasks = []
    for name, weight in weights.items():
        importance = square_means[name] / scales.square()
        tasks += [(rows, importance, schemes[name]) for rows in weight.split(ROWS_PER_TASK)]
    per_candidate = torch.stack(list(pool.map(loss, tasks))).double().sum(0)
    best = int(per_candidate.argmin())  # the first of equals, and the identity stands first
    exponent, duo, scale = candidates[best]
    return Scaling(
        None if best == 0 else scale, exponent, duo, float(per_candidate[best]), float(per_candidate[0])
    )  # fmt: skip


def _candidates(
    weights: list[Tensor], absmean: Tensor, scheme: IntScheme, config: AwqConfig, powers_of_two: bool
) -> list[tuple[float, bool, Tensor]]:
    """(exponent, duo, scale) of every grid point, the identity first."""
    found = [(0.0, False, torch.ones_like(absmean))]
    salience = _relative_magnitude(torch.cat(weights), scheme)
    for duo in (False, True) if config.duo_scaling else (False,):
        for i in range(config.grid):
            exponent = i / (config.grid - 1)
            scale = absmean.clamp(min=1e-8).pow(exponent)
            if duo:
                scale = scale / (salience.pow(1 - exponent) + 1e-4)
            elif i == 0:
                continue
            scale = scale.clamp(1e-4, 1e4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            if powers_of_two:
                scale = (scale / scale.median()).log2().round().exp2()  # most channels stay as they are
            found.append((exponent, duo, torch.where(torch.isfinite(scale), scale, 1.0)))
    return found


def _relative_magnitude(weight: Tensor, scheme: IntScheme) -> Tensor:
    """Mean over rows of |w| / max |w| within its group: (in,)."""
    out, width = weight.shape
    groups = weight.abs().reshape(out, scheme.groups(width), -1)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-8)).reshape(out, width).mean(0)


def round_clipped(
    weight: Tensor, importance: Tensor | None, scheme: IntScheme, scale_dtype: torch.dtype
) -> QuantizedTensor:
    """Rounds one (scaled) weight (out, in) float32 after the clip search.

    importance: (groups, group_size, group_size), E[x x^T] within each group, by which the search weighs a group's
    error; None clips nothing and covers the whole range.
    """
    if importance is None:
        return quantize(weight, min_max_grid(weight, scheme, scale_dtype))
    return quantize(weight, search_grid(weight, scheme, scale_dtype, importance))
