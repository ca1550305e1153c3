"""Which Triton product multiplies a scheme's weights on a GPU, and why; packing for it, and the product itself.

Imports triton only where something is packed or multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from compress.kernels.dispatch import Choice
from compress.kernels.triton import available, packing, rounded_packing
from compress.types import Fp8Scheme, QuantizedTensor, Scheme


def choose(scheme: Scheme, columns: int, device: torch.device | str) -> Choice:
    """`triton` or `reference` (decoded weights) for a scheme with so many columns on `device`."""
    if (reason := available.obstacle(device)) is not None:
        return Choice("reference", reason)
    if rounded_packing.obstacle(scheme, columns) is None:
        if isinstance(scheme, Fp8Scheme) and not available.multiplies_fp8(torch.device(device)):
            return Choice("triton", "this device multiplies no FP8: both sides decoded to bfloat16 inside the product")
        return Choice("triton", "8-bit inputs and weights multiplied as they are")
    if (reason := packing.obstacle(scheme, columns)) is not None:
        return Choice("reference", reason)
    before = "" if scheme.inputs is None else ", inputs rounded by torch before it"
    return Choice("triton", f"weights decoded inside the product{before}")


def pack(quantized: QuantizedTensor, input_scale: Tensor | None, bias: Tensor | None) -> tuple[Any, bool]:
    """A weight packed for `multiply` on the device of its codes, and whether that rounds its inputs.

    input_scale (1,) where its scheme's inputs are static. ValueError where `choose` names no kernel.
    """
    if rounded_packing.obstacle(quantized.scheme, quantized.codes.shape[1]) is None:
        return rounded_packing.pack(quantized, input_scale, bias), True
    return packing.pack(quantized, bias), False


def stack(experts: Sequence[Any]) -> tuple[Any, list[Any]] | None:
    """Packed weights of experts as one for `multiply_experts`, and each again, in the memory of that one.

    None where a kernel rounds their inputs, or where they are not alike.
    """
    if not all(isinstance(packed, packing.PackedWeight) for packed in experts):
        return None
    stacked = packing.stack(experts)
    return None if stacked is None else (stacked, [packing.member(stacked, i) for i in range(len(experts))])


def route(stacked: Any, chosen: Tensor, dtype: torch.dtype, same: bool = False) -> Any:
    """The way of pairs to their experts for `multiply_experts`: chosen (pairs,) int32; same: as in `multiply`."""
    from compress.kernels.triton import experts

    return experts.route(chosen, stacked, dtype, same)


def multiply_experts(stacked: Any, x: Tensor, way: Any, every: int) -> Tensor:
    """Each x times the weight of its expert, transposed: (pairs, out); `kernels.triton.experts.multiply_experts`."""
    from compress.kernels.triton import experts

    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return experts.multiply_experts(stacked, x, way, every)


def multiply(packed: Any, x: Tensor, same: bool = False) -> Tensor:
    """x (..., in) times what `pack` packed, transposed, plus its bias: (..., out) in the dtype of x.

    same: a token's outputs are the same bits whatever the others are and however many.
    """
    from compress.kernels.triton import linear, rounded_linear

    here = torch.cuda.device(x.device) if x.is_cuda else nullcontext()  # triton launches on the current device
    with here:
        if isinstance(packed, packing.PackedWeight):
            return linear.multiply(packed, x, same)
        return rounded_linear.multiply(packed, x, same)


def multiply_dense(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times weight (out, in), transposed, plus bias (out,), with `same` as in `multiply`."""
    from compress.kernels.triton import dense

    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return dense.multiply(weight, x, bias)
