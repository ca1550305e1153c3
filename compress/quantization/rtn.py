"""Round to nearest: the data-free baseline (Jacob et al., arXiv:1712.05877, section 2.1).

Min-max range by default, which is what the field calls RTN; `scale_search` shrinks each range to the least squared
weight error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantization.configs import RtnConfig
from compress.quantization.grid import min_max_grid, quantize, search_grid
from compress.types import IntScheme, QuantizedTensor


def transform(weight: Tensor, scheme: IntScheme, config: RtnConfig, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Quantises one weight (out, in) float32; scales are stored in `scale_dtype`."""
    build = search_grid if config.scale_search else min_max_grid
    return quantize(weight, build(weight, scheme, scale_dtype))
