"""x times a packed weight on a GPU: `gemv` for one token, tensor cores for more, both with split columns."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from compress.kernels.triton.configs import Config, config
from compress.kernels.triton.gemm import finish_kernel, gemm_kernel
from compress.kernels.triton.gemv import MAGIC, gemv_kernel
from compress.kernels.triton.packing import PackedWeight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FINISH_BLOCK = 1024


def multiply(weight: PackedWeight, x: Tensor) -> Tensor:
    """x (..., in) times the weight, transposed, plus its bias: (..., out) in the dtype of x.

    x bfloat16, float16 or float32, on the weight's device. One token: weights are (code - zero) * scale in float32.
    More: that rounded to x's dtype. Sums are float32 and of one order for a shape, so a product repeats bit for bit.
    ValueError where x does not fit.
    """
    if x.shape[-1] != weight.columns or x.dtype not in DTYPES or x.device != weight.words.device:
        raise ValueError(
            f"inputs {x.dtype} {tuple(x.shape)} on {x.device} do not fit a weight of {weight.columns} columns on "
            f"{weight.words.device}"
        )
    inputs = x.reshape(-1, weight.columns).contiguous()
    tokens, chunks = inputs.shape[0], weight.words.shape[0]
    out = torch.empty(tokens, weight.rows, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out.view(*x.shape[:-1], weight.rows)
    cut = config("gemv" if tokens == 1 else "gemm", x.device, weight.bits, tokens, weight.rows, chunks)
    whole = cut.splits == 1
    target = out if whole else torch.empty(cut.splits, tokens, weight.rows, dtype=torch.float32, device=x.device)
    constants = _constants(weight, cut)
    bias = weight.bias if whole else None
    stored = (weight.words, weight.high, weight.scale, weight.zero, weight.divisor, bias, target)
    sizes = (weight.rows, weight.columns, chunks, cut.splits)
    row_blocks = triton.cdiv(weight.rows, cut.block_rows)
    if tokens == 1:
        gemv_kernel[(row_blocks, cut.splits)](inputs, *stored, None, *sizes, 0, 1, MAGIC, **constants)
    else:
        grid = (row_blocks, triton.cdiv(tokens, cut.block_tokens), cut.splits)
        gemm_kernel[grid](inputs, *stored, tokens, *sizes, **constants, BLOCK_TOKENS=cut.block_tokens)
    if not whole:
        finish_kernel[(triton.cdiv(out.numel(), _FINISH_BLOCK),)](
            target, weight.bias, out, weight.rows, out.numel(), cut.splits, BLOCK=_FINISH_BLOCK
        )
    return out.view(*x.shape[:-1], weight.rows)


def multiply_experts(experts: PackedWeight, x: Tensor, chosen: Tensor, every: int) -> Tensor:
    """Each x times the weight of its expert, transposed, plus its bias: (pairs, out) in the dtype of x.

    experts: of `packing.stack`. chosen (pairs,) int32: their numbers; pair i takes row i // every of x, contiguous.
    Weights have the value (code - zero) * scale in float32, as one token's in `multiply`. No choice of experts changes
    what is launched.
    """
    pairs, chunks = chosen.shape[0], experts.words.shape[1]
    if x.shape != (pairs // every, experts.columns) or x.dtype not in DTYPES or not x.is_contiguous():
        raise ValueError(f"inputs {x.dtype} {tuple(x.shape)} do not fit {pairs} pairs, {every} of each row")
    cut = config("gemv", x.device, experts.bits, 1, experts.rows, chunks)
    cut = replace(cut, splits=max(1, cut.splits // pairs))
    whole = cut.splits == 1
    out = torch.empty(pairs, experts.rows, dtype=x.dtype, device=x.device)
    target = out if whole else torch.empty(cut.splits, pairs, experts.rows, dtype=torch.float32, device=x.device)
    gemv_kernel[(triton.cdiv(experts.rows, cut.block_rows), cut.splits, pairs)](
        x, experts.words, experts.high, experts.scale, experts.zero, experts.divisor, experts.bias if whole else None,
        target, chosen, experts.rows, experts.columns, chunks, cut.splits, experts.scale.shape[1], every, MAGIC,
        **_constants(experts, cut),
    )  # fmt: skip
    if not whole:
        finish_kernel[(triton.cdiv(out.numel(), _FINISH_BLOCK),)](
            target, None, out, experts.rows, out.numel(), cut.splits, BLOCK=_FINISH_BLOCK
        )
        if experts.bias is not None:
            out += experts.bias[chosen]
    return out


def _constants(weight: PackedWeight, cut: Config) -> dict[str, int | str]:
    return {
        "CODES": weight.codes,
        "SCALE_KIND": weight.scale_kind,
        "BITS": weight.bits,
        "FIELD": weight.field,
        "GROUP": weight.group,
        "PLANES_PER_SCALE": weight.planes_per_scale,
        "BLOCK_ROWS": cut.block_rows,
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }
