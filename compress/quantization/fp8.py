"""FP8 E4M3 weights (Micikevicius et al., arXiv:2209.05433): the largest magnitude of what shares a scale becomes 448.

E4M3 keeps 3 bits of mantissa over 17 octaves, so unlike on an integer grid a tighter range buys nothing: values far
below the largest keep their precision. Tiles of 128 x 128 are DeepSeek-V3's (arXiv:2412.19437, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats import fp8
from compress.kernels.scales import stored_scale
from compress.types import FP8_HIGHEST, FP8_TILE, Fp8Scheme, QuantizedTensor


def transform(
    weight: Tensor, scheme: Fp8Scheme, scale_dtype: torch.dtype, highest: float | None = None
) -> QuantizedTensor:
    """Quantises one weight (out, in) float32; scales are stored in `scale_dtype`.

    highest: for a scale per tensor, the largest magnitude that it covers; the weight's own if None. Linears that an
    engine loads as one matrix must share it.
    """
    scale = stored_scale(_range(weight, scheme, highest) / FP8_HIGHEST, scale_dtype, round(FP8_HIGHEST))
    spread = scale.float()
    if scheme.granularity == "tile":
        out, width = weight.shape
        spread = spread.repeat_interleave(FP8_TILE, 0)[:out].repeat_interleave(FP8_TILE, 1)[:, :width]
    return QuantizedTensor(fp8.encode(weight / spread), scale, None, scheme)


def _range(weight: Tensor, scheme: Fp8Scheme, highest: float | None) -> Tensor:
    """The largest magnitudes, in the shape of the scale."""
    if scheme.granularity == "channel":
        return weight.abs().amax(1, keepdim=True)
    if scheme.granularity == "tile":
        return fp8.tiles(weight).abs().amax((1, 3))
    return torch.tensor([highest]) if highest is not None else weight.abs().amax().reshape(1)
