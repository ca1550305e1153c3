"""Products of 8-bit inputs and 8-bit weights: int8 with whole sums, FP8 where the GPU multiplies it, else as bfloat16.

As in `gemm`, the product is transposed, (rows, tokens). Scales of tokens and rows come after the sum; those of tiles of
128 x 128 weights and of 128 inputs after each 128 columns, which is also how often FP8 sums go to full float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.triton.decode import dot, e4m3, rounded_to


@triton.jit(do_not_specialize=["tokens", "chunks", "splits"])
def rounded_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    columns,
    chunks,
    splits,
    CODES: tl.constexpr,
    TILES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """out (splits, tokens, rows): partial sums in float32, or with one split the result, bias added.

    x (tokens, columns), x_scale (tokens,) or with TILES (tokens, chunks); weight (rows, columns), weight_scale (rows,)
    with ROW_SCALES, with TILES (rows / 128, chunks), else (1,). CODES: "int8", "fp8", or "bytes": FP8 as uint8.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # first, as in `gemm`
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(2)
    inside, held = row < rows, token < tokens
    ZERO: tl.constexpr = 0.0 if CODES == "fp8" else 0
    lane = tl.arange(0, 128)
    weight_at = weight_ptr + row.to(tl.int64)[:, None] * columns + lane[None, :]
    x_at = x_ptr + token.to(tl.int64)[None, :] * columns + lane[:, None]
    if CODES == "int8":
        total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.int32)
    else:
        total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for chunk in range(split * chunks // splits, (split + 1) * chunks // splits):
        left = columns - chunk * 128
        weight = tl.load(weight_at + chunk * 128, mask=inside[:, None] & (lane < left)[None, :], other=ZERO)
        x = tl.load(x_at + chunk * 128, mask=held[None, :] & (lane < left)[:, None], other=ZERO)
        if CODES == "int8":
            total = tl.dot(weight, x, total, out_dtype=tl.int32)
        else:
            before = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32) if TILES else total
            if CODES == "bytes":
                part = dot(e4m3(weight).to(tl.bfloat16), e4m3(x).to(tl.bfloat16), before)
            else:
                part = tl.dot(weight, x, before, max_num_imprecise_acc=128)
            if TILES:
                of_rows = tl.load(weight_scale_ptr + row // 128 * chunks + chunk, mask=inside, other=0.0)
                of_tokens = tl.load(x_scale_ptr + token * chunks + chunk, mask=held, other=0.0)
                total += part * (of_rows[:, None] * of_tokens[None, :])
            else:
                total = part
    result = total.to(tl.float32)
    if not TILES:
        of_tokens = tl.load(x_scale_ptr + token, mask=held, other=0.0)
        if ROW_SCALES:
            of_rows = tl.load(weight_scale_ptr + row, mask=inside, other=0.0)
            result *= of_rows[:, None] * of_tokens[None, :]
        else:
            result *= tl.load(weight_scale_ptr) * of_tokens[None, :]
    if bias_ptr is not None:
        result += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = (split.to(tl.int64) * tokens + token)[None, :] * rows + row[:, None]
    tl.store(out_ptr + at, rounded_to(result, out_ptr.dtype.element_ty), mask=inside[:, None] & held[None, :])
