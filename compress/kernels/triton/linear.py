"""x times a packed weight on a GPU: `gemv` for one token, tensor cores for more, both with split columns."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from compress.kernels.triton.configs import SAME_TOKENS, Config, config
from compress.kernels.triton.gemm import gemm_kernel
from compress.kernels.triton.gemv import MAGIC, gemv_kernel
from compress.kernels.triton.packing import PackedWeight
from compress.kernels.triton.splits import Sums

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def multiply(weight: PackedWeight, x: Tensor, same: bool = False) -> Tensor:
    """x (..., in) times the weight, transposed, plus its bias: (..., out) in the dtype of x.

    x bfloat16, float16 or float32, on the weight's device. One token: weights are (code - zero) * scale in float32.
    More: that rounded to x's dtype. Sums are float32 and of one order for a shape, so a product repeats bit for bit.
    same: a token's outputs are the same bits whatever the others are and however many: one token is as several.
    ValueError where x does not fit.
    """
    if x.shape[-1] != weight.columns or x.dtype not in DTYPES or x.device != weight.words.device:
        raise ValueError(
            f"inputs {x.dtype} {tuple(x.shape)} on {x.device} do not fit a weight of {weight.columns} columns on "
            f"{weight.words.device}"
        )
    inputs = x.reshape(-1, weight.columns).contiguous()
    tokens, chunks, shape = inputs.shape[0], weight.words.shape[0], (*x.shape[:-1], weight.rows)
    if tokens == 0:
        return x.new_empty(shape)
    alone = tokens == 1 and not same
    shared = SAME_TOKENS if same else tokens
    cut = config("gemv" if alone else "gemm", x.device, weight.bits, shared, weight.rows, chunks, 8 * x.itemsize)
    sums = Sums(x, tokens, weight.rows, cut.splits, weight.bias)
    stored = (weight.words, weight.high, weight.scale, weight.zero, weight.divisor, sums.bias, sums.target)
    sizes = (weight.rows, weight.columns, chunks, cut.splits)
    row_blocks = triton.cdiv(weight.rows, cut.block_rows)
    if alone:
        gemv_kernel[(row_blocks, cut.splits)](inputs, *stored, None, *sizes, 0, 1, MAGIC, **constants(weight, cut))
    else:
        grid = (triton.cdiv(tokens, cut.block_tokens), row_blocks, cut.splits)
        fixed = constants(weight, cut)
        gemm_kernel[grid](inputs, *stored, None, None, tokens, *sizes, 0, 1, **fixed, BLOCK_TOKENS=cut.block_tokens)
    return sums.finished().view(shape)


def constants(weight: PackedWeight, cut: Config) -> dict[str, int | str]:
    """What `gemv_kernel` and `gemm_kernel` are compiled for."""
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
