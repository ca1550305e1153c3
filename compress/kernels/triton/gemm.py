"""Several tokens times a packed weight on tensor cores: decoded in registers, columns shared out over `splits`.

The product is computed transposed, (rows, tokens): weights, which come out of arithmetic, are then the operand that
tensor cores take from registers, and few tokens fill a block of few columns. Weights are rounded to the inputs' dtype,
in which a weight-only scheme defines them; sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.triton.decode import dot, e2m1, e4m3, rounded_to, scale_index, scale_of


@triton.jit(do_not_specialize=["tokens", "chunks", "splits"])
def gemm_kernel(
    x_ptr,
    words_ptr,
    high_ptr,
    scale_ptr,
    zero_ptr,
    divisor_ptr,
    bias_ptr,
    out_ptr,
    blocks_ptr,
    order_ptr,
    tokens,
    rows,
    columns,
    chunks,
    splits,
    groups,
    every,
    CODES: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES_PER_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """out (splits, tokens, rows): partial sums in float32, or with one split the result, bias added.

    With blocks and order, those of `experts.Route`: weights lie one expert after the other, and the tokens of a block
    are pairs of which number i is row i // every of x and row i of out.
    """
    PLANES: tl.constexpr = 32 // FIELD
    CHUNK: tl.constexpr = PLANES * 16
    SCALES: tl.constexpr = PLANES // PLANES_PER_SCALE
    # blocks of tokens first: those that read the same weights run side by side, and the cache has them
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(2)
    inside = row < rows
    number = tl.arange(0, BLOCK_TOKENS)
    first, last = split * chunks // splits, (split + 1) * chunks // splits
    if blocks_ptr is not None:
        block = blocks_ptr + tl.program_id(0) * 3
        expert, count = tl.load(block).to(tl.int64), tl.load(block + 2)
        there = number < count
        token = tl.load(order_ptr + tl.load(block + 1) + number, mask=there, other=0)
        last = tl.where(count == 0, first, last)
        words_ptr += expert * chunks * rows * 16
        scale_ptr += expert * groups * rows
        if BITS == 3:
            high_ptr += expert * chunks * rows * 16
        if zero_ptr is not None:
            zero_ptr += expert * groups * rows
        if divisor_ptr is not None:
            divisor_ptr += expert
        if bias_ptr is not None:
            bias_ptr += expert * rows
        source = token // every
    else:
        token = tl.program_id(0) * BLOCK_TOKENS + number
        there, source = token < tokens, token
    plane = tl.arange(0, PLANES)
    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    stride = tl.full((), 16, tl.int64) * rows
    for chunk in range(first, last):
        at = chunk * stride + row[:, None] * 16 + tl.arange(0, 16)[None, :]
        words = tl.load(words_ptr + at, mask=inside[:, None], other=0)
        code = (words[:, None, :] >> (plane * FIELD)[None, :, None]) & ((1 << FIELD) - 1)
        if BITS == 3:
            high = tl.load(high_ptr + at, mask=inside[:, None], other=0).to(tl.int32)
            code |= ((high[:, None, :] >> plane[None, :, None]) & 1) << 2
        if CODES == "fp4":
            value = e2m1(code)
        elif CODES == "fp8":
            value = e4m3(code)
        else:
            value = code.to(tl.float32) - 2 ** (BITS - 1)
        value = tl.reshape(value, (BLOCK_ROWS, SCALES, PLANES_PER_SCALE * 16))
        group = scale_index(chunk * CHUNK + tl.arange(0, SCALES) * (PLANES_PER_SCALE * 16), GROUP)
        grid = tl.broadcast_to(group[None, :] * rows + row[:, None], (BLOCK_ROWS, SCALES))
        if CODES == "int" and zero_ptr is not None:
            value -= tl.load(zero_ptr + grid, mask=inside[:, None], other=0).to(tl.float32)[:, :, None]
        scale = scale_of(tl.load(scale_ptr + grid, mask=inside[:, None], other=0), divisor_ptr, SCALE_KIND)
        weight = rounded_to(tl.reshape(value * scale[:, :, None], (BLOCK_ROWS, CHUNK)), x_ptr.dtype.element_ty)
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(
            x_ptr + source.to(tl.int64)[None, :] * columns + column[:, None],
            mask=there[None, :] & (column < columns)[:, None],
            other=0.0,
        )
        total = dot(weight, x, total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = (split.to(tl.int64) * tokens + token)[None, :] * rows + row[:, None]
    tl.store(out_ptr + at, rounded_to(total, out_ptr.dtype.element_ty), mask=inside[:, None] & there[None, :])
