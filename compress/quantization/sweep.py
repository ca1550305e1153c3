"""Round to nearest on scales found by a sweep that weighs each group's rounding error with its inputs' second moments.

The weighting by the local Hessian is that of the diagonal blocks in GPTQ (arXiv:2210.17323); there is no error
feedback, so a group's codes depend on its own weights and inputs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantization import block_floats
from compress.quantization.grid import quantize, search_grid
from compress.types import BlockFloatScheme, IntScheme, QuantizedTensor


def transform(
    weight: Tensor,
    scheme: IntScheme | BlockFloatScheme,
    importance: Tensor,
    scale_dtype: torch.dtype,
    highest: float | None = None,
) -> QuantizedTensor:
    """Quantises rows (out, in) float32 of one weight; integer scales are stored in `scale_dtype`.

    importance: (groups, group_size, group_size) float32, mean x x^T within each group. highest: as for
    `block_floats.transform`.
    """
    if isinstance(scheme, BlockFloatScheme):
        return block_floats.transform(weight, scheme, True, highest, importance)
    return quantize(weight, search_grid(weight, scheme, scale_dtype, importance))
