"""One token times a packed weight: a block of rows per program, the columns shared out over `splits` programs.

Integer codes become float32 without a conversion: the field's bits are put into the mantissa of 2^23 where they stand,
which makes the number 2^23 + code * 2^place; the power of two is taken back from the input. Every weight has exactly
the value (code - zero) * scale; products and sums are float32. The bits of 2^23 come as an argument: from a register,
masking a field and putting it there is one instruction, and two where both are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.triton.decode import e2m1, e4m3, rounded_to, scale_index, scale_of

MAGIC = 0x4B000000
"""The bits of float32 2^23, which `gemv_kernel` wants as `magic`."""


@triton.jit(do_not_specialize=["chunks", "splits"])
def gemv_kernel(
    x_ptr,
    words_ptr,
    high_ptr,
    scale_ptr,
    zero_ptr,
    divisor_ptr,
    bias_ptr,
    out_ptr,
    experts_ptr,
    rows,
    columns,
    chunks,
    splits,
    groups,
    every,
    magic,
    CODES: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES_PER_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """out (splits, rows): partial sums in float32, or with one split the result in the dtype of `out`, bias added.

    With experts (pairs,): weights lie one expert after the other, pair i is row i // every of x times the weight of its
    expert, and out is (splits, pairs, rows).
    """
    PLANES: tl.constexpr = 32 // FIELD
    CHUNK: tl.constexpr = PLANES * 16
    if experts_ptr is not None:
        pair = tl.program_id(2)
        expert = tl.load(experts_ptr + pair).to(tl.int64)
        x_ptr += pair // every * columns
        out_ptr += pair * rows
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
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    inside = row < rows
    lane = tl.arange(0, 16)
    split = tl.program_id(1)
    first, last = split * chunks // splits, (split + 1) * chunks // splits
    total = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    stride = tl.full((), 16, tl.int64) * rows
    at = first * stride + row * 16 + lane[None, :]
    coming = tl.load(words_ptr + at, mask=inside, other=0)
    if BITS == 3:
        coming_high = tl.load(high_ptr + at, mask=inside, other=0).to(tl.int32)
    for chunk in range(first, last):
        words = coming
        at += stride
        more = inside & (chunk + 1 < last)  # the next words are on their way while these are multiplied
        coming = tl.load(words_ptr + at, mask=more, other=0)
        if BITS == 3:
            high = coming_high
            coming_high = tl.load(high_ptr + at, mask=more, other=0).to(tl.int32)
        part = tl.zeros((BLOCK_ROWS, 16), tl.float32)
        for plane in tl.static_range(PLANES):
            if plane % PLANES_PER_SCALE == 0:
                group = scale_index(chunk * CHUNK + plane * 16, GROUP)
                scale = scale_of(
                    tl.load(scale_ptr + group * rows + row, mask=inside, other=0), divisor_ptr, SCALE_KIND
                )  # fmt: skip
                if CODES == "int":
                    offset = tl.full((BLOCK_ROWS, 1), 2 ** (BITS - 1), tl.float32)
                    if zero_ptr is not None:
                        offset += tl.load(zero_ptr + group * rows + row, mask=inside, other=0).to(tl.float32)
            column = chunk * CHUNK + plane * 16 + lane
            x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
            if CODES == "int" and BITS != 3:
                field = (words >> (plane * FIELD // 16 * 16)) & (((1 << FIELD) - 1) << (plane * FIELD % 16))
                moved = (field | magic).to(tl.float32, bitcast=True)
                value = moved - (offset * 2.0 ** (plane * FIELD % 16) + 8388608.0)
                part += value * (x * 2.0 ** -(plane * FIELD % 16))[None, :]
            elif CODES == "int":
                code = ((words >> (plane * 2)) & 3) | (((high >> plane) & 1) << 2)
                value = (code | magic).to(tl.float32, bitcast=True) - (offset + 8388608.0)
                part += value * x[None, :]
            elif CODES == "fp4":
                part += e2m1((words >> (plane * 4)) & 15) * x[None, :]
            else:
                part += e4m3((words >> (plane * 8)) & 255) * x[None, :]
            if (plane + 1) % PLANES_PER_SCALE == 0:
                total += part * scale
                part = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    result = tl.sum(total, axis=1, keep_dims=True)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + split * tl.num_programs(2) * rows + row, rounded_to(result, out_ptr.dtype.element_ty), mask=inside
    )
