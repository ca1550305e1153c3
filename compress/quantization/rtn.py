"""Round to nearest: the data-free baseline (Jacob et al., arXiv:1712.05877, section 2.1).

Min-max range by default, which is what the field calls RTN; `scale_search` shrinks each range to the least squared
weight error, or for blocks of floats tries the stored scales around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantization import block_floats, fp8, normal_floats
from compress.quantization.configs import RtnConfig
from compress.quantization.grid import min_max_grid, quantize, search_grid
from compress.types import BlockFloatScheme, Fp8Scheme, NormalFloatScheme, QuantizedTensor, Scheme


def transform(
    weight: Tensor, scheme: Scheme, config: RtnConfig, scale_dtype: torch.dtype, highest: float | None = None
) -> QuantizedTensor:
    """Quantises one weight (out, in) float32; scales are stored in `scale_dtype`, into which NF4 decodes.

    highest: as `fp8.transform` and `block_floats.transform` take it, where a number covers the whole matrix.
    """
    if isinstance(scheme, BlockFloatScheme):
        return block_floats.transform(weight, scheme, config.scale_search, highest)
    if isinstance(scheme, Fp8Scheme):
        return fp8.transform(weight, scheme, scale_dtype, highest)
    if isinstance(scheme, NormalFloatScheme):
        return normal_floats.transform(weight, scheme, scale_dtype, config.scale_search)
    build = search_grid if config.scale_search else min_max_grid
    return quantize(weight, build(weight, scheme, scale_dtype))
