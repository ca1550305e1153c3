"""Round to nearest: the data-free baseline (Jacob et al., arXiv:1712.05877, section 2.1).

Min-max range by default, which is what the field calls RTN; `scale_search` shrinks each range to the least squared
weight error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantization import fp8
from compress.quantization.configs import RtnConfig
from compress.quantization.grid import min_max_grid, quantize, search_grid
from compress.types import Fp8Scheme, QuantizedTensor, Scheme


def transform(
    weight: Tensor, scheme: Scheme, config: RtnConfig, scale_dtype: torch.dtype, highest: float | None = None
) -> QuantizedTensor:
    """Quantises one weight (out, in) float32; scales are stored in `scale_dtype`.

    highest: as `fp8.transform` takes it, for FP8 with a scale per tensor.
    """
    if isinstance(scheme, Fp8Scheme):
        return fp8.transform(weight, scheme, scale_dtype, highest)
    build = search_grid if config.scale_search else min_max_grid
    return quantize(weight, build(weight, scheme, scale_dtype))
