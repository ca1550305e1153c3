"""Linears repacked for the native products: made once at load, multiplied many times.

A product takes float32 inputs as they are (exact: every weight has the value that its format defines, only that scales
of FP8 and MXFP4 meet sums of up to 64 products and not each of them), or, of packed integers, rounds them to 8 bits
first, one scale per token and block of up to 128 inputs; in a block whose largest |x| is beyond 24 times the mean of
the others, the scale serves the others, and what is beyond it is multiplied apart, in 8 more bits. Where the scheme
itself rounds inputs, either way does that, and the exact one goes on in float32. An output does not depend on how many
other tokens there are, nor on the number of threads, in any bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.kernels.dispatch import native
from compress.types import InputScheme, IntScheme, Scheme

CHUNK = 32
"""Every group size of integers but a whole row's is a multiple of it."""
_ROUNDED = {("float", 8): "fp8", ("e4m3", 4): "nvfp4", ("e8m0", 4): "mxfp4", ("e8m0", 8): "mxfp8"}


def rounding(inputs: InputScheme | None) -> str | None:
    """What the native product calls this way of rounding inputs; None if it has none for it."""
    if inputs is None:
        return "none"
    if inputs.type == "int":
        if inputs.granularity == "group" or inputs.bits != 8:
            return None
        return "narrow" if inputs.narrow else "int8"
    return _ROUNDED.get((inputs.scale_type, inputs.bits))


def obstacle(scheme: Scheme, columns: int) -> str | None:
    """Why the native product does not take weights of this scheme with so many inputs; None if it does."""
    if rounding(scheme.inputs) is None:
        return f"{scheme.name} rounds what enters it in a way of its own"
    if not isinstance(scheme, IntScheme) or scheme.group_size in (None, columns):
        return None
    if (scheme.group_size or 0) % CHUNK == 0:
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
    input_scale: float = 0.0,
) -> Any:
    """A weight (out, columns) from its packed words, as `formats.int_packed.pack_bits` makes them.

    words int32 (out, ceil(columns * bits / 32)); scale (out, groups) float32, float16 or bfloat16; zero_point int8
    (out, groups) or None; bias (out). Codes of 7 bits take 8. input_scale: where the scheme's inputs are static.
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
        _inputs(scheme.inputs, input_scale),
    )


@dataclass(frozen=True, eq=False, slots=True)
class FloatWeight:
    """A weight (out, columns) whose codes are floats: value = table[code] * scale, rounded to `dtype`.

    words: the codes' bytes (out, ...) as int32, low columns first: E4M3, or, with a table (16,) float32, codes of 4
    bits. scale (out, groups): float32, or uint8 that holds FP8 or exponents as `scale_type` says; an FP8 scale is
    multiplied by `factor` and divided by `divisor`. group_size: inputs that share a scale.
    """

    words: Tensor
    columns: int
    table: Tensor | None
    scale: Tensor
    scale_type: str
    group_size: int
    dtype: torch.dtype = torch.float32
    factor: float = 1.0
    divisor: float = 1.0

    def rows(self, start: int, end: int) -> FloatWeight:
        """Some of the rows."""
        return replace(self, words=self.words[start:end], scale=self.scale[start:end])


def pack_floats(
    weight: FloatWeight,
    inputs: InputScheme | None = None,
    bias: Tensor | None = None,
    threads: int | None = None,
    input_scale: float = 0.0,
) -> Any:
    """Such a weight. inputs: how its format rounds them, with what calibration stored where that is static.

    Raises:
        ValueError: a code of FP8 is NaN.
    """
    return native().pack_floats(
        weight.words.contiguous(),
        weight.scale.contiguous(),
        weight.columns,
        weight.group_size,
        weight.table,
        weight.scale_type,
        str(weight.dtype).removeprefix("torch."),
        weight.factor,
        weight.divisor,
        _bias(bias),
        _threads(threads),
        _inputs(inputs, input_scale),
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


def _inputs(inputs: InputScheme | None, scale: float) -> tuple[str, int, float]:
    name = rounding(inputs)
    assert name is not None
    return name, 0 if inputs is None else inputs.group_size or 0, scale


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads
