"""x times a dense weight on tensor cores, cut alike for any number of tokens: what cuBLAS does not promise.

As in `gemm`, the product is computed transposed, (rows, tokens).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.triton.configs import SAME_TOKENS, config
from compress.kernels.triton.decode import dot, rounded_to
from compress.kernels.triton.splits import Sums

CHUNK = 64
"""Columns of a step."""


@triton.jit(do_not_specialize=["tokens", "chunks", "splits"])
def dense_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    columns,
    chunks,
    splits,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """out (splits, tokens, rows): partial sums in float32, or with one split the result, bias added."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # first, as in `gemm`
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(2)
    inside, there, lane = row < rows, token < tokens, tl.arange(0, CHUNK)
    weight_at = weight_ptr + row.to(tl.int64)[:, None] * columns + lane[None, :]
    x_at = x_ptr + token.to(tl.int64)[None, :] * columns + lane[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for chunk in range(split * chunks // splits, (split + 1) * chunks // splits):
        held = lane < columns - chunk * CHUNK
        weight = tl.load(weight_at + chunk * CHUNK, mask=inside[:, None] & held[None, :], other=0.0)
        x = tl.load(x_at + chunk * CHUNK, mask=there[None, :] & held[:, None], other=0.0)
        total = dot(weight, x, total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = (split.to(tl.int64) * tokens + token)[None, :] * rows + row[:, None]
    tl.store(out_ptr + at, rounded_to(total, out_ptr.dtype.element_ty), mask=inside[:, None] & there[None, :])


def multiply(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), transposed, plus bias (out,): (..., out) in the dtype of x.

    weight, contiguous, and bias have the dtype and the device of x; sums are float32. A token's outputs are the same
    bits whatever the others are and however many. ValueError where x does not fit.
    """
    rows, columns = weight.shape
    if x.shape[-1] != columns or x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"inputs {x.dtype} {tuple(x.shape)} on {x.device} do not fit {weight.dtype} {(rows, columns)}")
    inputs = x.reshape(-1, columns).contiguous()
    tokens, chunks, shape = inputs.shape[0], triton.cdiv(columns, CHUNK), (*x.shape[:-1], rows)
    if tokens == 0:
        return x.new_empty(shape)
    bits = 8 * x.itemsize
    cut = config("dense", x.device, bits, SAME_TOKENS, rows, chunks, bits)
    sums = Sums(x, tokens, rows, cut.splits, bias)
    dense_kernel[(triton.cdiv(tokens, cut.block_tokens), triton.cdiv(rows, cut.block_rows), cut.splits)](
        inputs, weight, sums.bias, sums.target, tokens, rows, columns, chunks, cut.splits,
        CHUNK=CHUNK, BLOCK_ROWS=cut.block_rows, BLOCK_TOKENS=cut.block_tokens, num_warps=cut.warps,
        num_stages=cut.stages,
    )  # fmt: skip
    return sums.finished().view(shape)
