"""GPTQ for blocks of floats: as `gptq`, on block scales that are chosen first and stay (frozen).

Levels of E2M1 are not evenly spaced, so codes are found by value: error feedback along the activation order, then
coordinate descent on the same objective tr((W* - Q) H (W* - Q)^T), every step of which rounds one column to the
nearest number of its block. A refit of scales given the codes has no place: stored scales are too coarse for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantization.block_floats import covering_scales, divisor, encode, nearest, search_scales, steps
from compress.quantization.configs import GptqConfig
from compress.quantization.gptq import Preconditioner
from compress.types import BlockFloatScheme, QuantizedTensor

COLUMNS_AT_A_TIME = 128
ROWS_PER_TILE = 512


def transform(
    weight: Tensor, shared: Preconditioner, scheme: BlockFloatScheme, config: GptqConfig, highest: float | None
) -> QuantizedTensor:
    """Quantises rows (out, in) float32 of a weight, as `Preconditioner.corrected` gives it; `shared` must be factored.

    highest: the largest magnitude of the whole matrix, and of those that engines load with it, where one number
    covers it all.
    """
    assert shared.factored is not None
    divided = divisor(highest or 0.0, scheme)
    if config.scale_search:
        importance = shared.inverse_blocks(scheme.groups(weight.shape[1]))
        scale = search_scales(weight, scheme, divided, importance)
    else:
        scale = covering_scales(weight, scheme, divided)
    step = steps(scale, divided).repeat_interleave(scheme.group_size, 1)
    order, back = shared.order, torch.argsort(shared.order)
    values = _feedback(weight[:, order], step[:, order], shared.factored.upper, scheme)[:, back]
    values = _descend(weight, values.contiguous(), step, shared.hessian, scheme, config.descent_sweeps)
    return encode(values, scale, divided, scheme)


def _feedback(weight: Tensor, step: Tensor, upper: Tensor, scheme: BlockFloatScheme) -> Tensor:
    """Algorithm 1 of GPTQ, columns as they come: rounded values of weight (rows, in), on steps of the same shape."""
    work, values = weight.clone(), torch.empty_like(weight)
    width = weight.shape[1]
    for start in range(0, width, COLUMNS_AT_A_TIME):
        end = min(start + COLUMNS_AT_A_TIME, width)
        block, errors = work[:, start:end].clone(), torch.empty(weight.shape[0], end - start)
        for i in range(end - start):
            column = start + i
            rounded = nearest(block[:, i] / step[:, column], scheme) * step[:, column]
            values[:, column] = rounded
            errors[:, i] = (block[:, i] - rounded) / upper[column, column]
            block[:, i + 1 :].addr_(errors[:, i], upper[column, column + 1 : end], alpha=-1)
        work[:, end:] -= errors @ upper[start:end, end:]
    return values


def _descend(
    target: Tensor, values: Tensor, step: Tensor, hessian: Tensor, scheme: BlockFloatScheme, sweeps: int
) -> Tensor:
    """Coordinate descent from `values` towards the minimum of (target - values) hessian (target - values)^T."""
    gradient = (target - values) @ hessian
    for _ in range(sweeps):
        moved = False
        for column, curvature in enumerate(hessian.diagonal().tolist()):
            wanted = values[:, column] + gradient[:, column] / curvature
            rounded = nearest(wanted / step[:, column], scheme) * step[:, column]
            change = rounded - values[:, column]
            if bool(change.any()):
                gradient.addr_(change, hessian[column], alpha=-1)
                values[:, column] = rounded
                moved = True
        if not moved:
            break
    return values
