"""Linears repacked for the native products: made once at load, multiplied many times.

A product takes float32 inputs as they are (exact: every weight has the value that its format defines), or rounds them
to 8 bits first, one scale per token and block of up to 128 inputs. Where the scheme itself rounds inputs to 8 bits, one
scale per token, either way does that, and the exact one goes on in float32. An output does not depend on how many other
tokens there are, nor on the number of threads, in any bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels.dispatch import native
from compress.types import InputScheme, IntScheme

CHUNK = 32
"""Every group size but a whole row's is a multiple of it."""
INPUTS = InputScheme("int", "token")
"""The one way of rounding inputs that a format may ask for and the native product follows."""


def obstacle(scheme: IntScheme, columns: int) -> str | None:
    """Why the native product does not take weights of this scheme with so many inputs; None if it does."""
    if scheme.inputs not in (None, INPUTS):
        return f"{scheme.name} rounds what enters it in a way of its own"
    if scheme.group_size in (None, columns) or (scheme.group_size or 0) % CHUNK == 0:
        return None
    return f"groups of {scheme.group_size} inputs are no multiple of {CHUNK}"


def pack_codes(
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    columns: int,
    scheme: IntScheme,
    bias: Tensor | None = None,
    threads: int | None = None,
) -> Any:
    """A weight (out, columns) from its packed words, as `formats.int_packed.pack_bits` makes them.

    words int32 (out, ceil(columns * bits / 32)); scale (out, groups) float32, float16 or bfloat16; zero_point int8
    (out, groups) or None; bias (out). Codes of 5 to 7 bits take 8. A scheme that rounds inputs rounds them to INPUTS.
    """
    group = columns if scheme.group_size is None else scheme.group_size
    zero = None if zero_point is None else zero_point.contiguous()
    return native().pack_codes(
        words.contiguous(),
        scale.contiguous(),
        zero,
        columns,
        group,
        scheme.bits,
        _bias(bias),
        _threads(threads),
        rounds_inputs=scheme.inputs is not None,
    )


def pack_dense(weight: Tensor, bias: Tensor | None = None, eight_bit: bool = False, threads: int | None = None) -> Any:
    """A plain weight (out, in): bfloat16 and float32 as they are, float16 as float32.

    eight_bit: rounded to nearest in 8 bits, symmetric, in groups of 128, 64 or 32 inputs or of the whole row.
    """
    columns = weight.shape[1]
    group = next((size for size in (128, 64, 32) if columns % size == 0), columns) if eight_bit else 0
    kept = weight if weight.dtype in (torch.bfloat16, torch.float32) else weight.float()
    return native().pack_dense(kept.contiguous(), group, _bias(bias), _threads(threads))


def multiply(linear: Any, x: Tensor, eight_bit: bool = False, threads: int | None = None) -> Tensor:
    """x (tokens, in) float32 times the weight, transposed, plus the bias: (tokens, out) float32."""
    out = torch.empty(x.shape[0], linear.rows)
    linear.multiply(x.contiguous(), out, eight_bit, _threads(threads))
    return out


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads
