"""Weights laid out for the Triton products, made once at load.

Codes fill int32 words in chunks of 16 words a row: word w of a chunk holds, in its field of bits j, the code of column
chunk * CHUNK + 16 j + w. So field j of all 16 words is a run of 16 columns, a load of a block of rows is one piece of
memory, and every group whose size is a multiple of 16 has one scale within a run. Three bits are two in such words and
one in 16-bit words of the same chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compress.types import BlockFloatScheme, IntScheme, QuantizedTensor, Scheme

RUN = 16
_TENSORS = ("words", "high", "scale", "zero", "divisor", "bias")
Codes = Literal["int", "fp4", "fp8"]
ScaleKind = Literal["float", "e4m3", "e8m0"]


@dataclass(frozen=True, eq=False, slots=True)
class PackedWeight:
    """One weight (rows, columns) of codes of `bits` bits: 2, 3, 4 or 8.

    words int32 (chunks, rows, 16); high int16 of that shape, the third bits, or None; scale (groups, rows), float, or
    bytes where scale_kind is "e4m3" or "e8m0", with groups for all columns of the last chunk; zero int8 likewise, or
    None; divisor (1,) float32 of all scales, or None; bias (rows,) or None. group: columns that share a scale, 0 for
    all of a row's.
    """

    words: Tensor
    high: Tensor | None
    scale: Tensor
    zero: Tensor | None
    divisor: Tensor | None
    bias: Tensor | None
    rows: int
    columns: int
    bits: int
    group: int
    codes: Codes
    scale_kind: ScaleKind

    @property
    def planes(self) -> int:
        """Runs of 16 columns in a chunk."""
        return 32 // self.field

    @property
    def field(self) -> int:
        """Bits of a code in `words`."""
        return 2 if self.bits == 3 else self.bits

    @property
    def planes_per_scale(self) -> int:
        """Consecutive runs of a chunk that surely share a scale: a divisor of `planes`."""
        chunk = self.planes * RUN
        if self.group % chunk == 0:
            return self.planes
        return self.group // RUN if chunk % self.group == 0 else 1

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        parts = (self.words, self.high, self.scale, self.zero, self.divisor, self.bias)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def obstacle(scheme: Scheme, columns: int) -> str | None:
    """Why these products do not take weights of a scheme with so many columns; None if they do."""
    if not isinstance(scheme, (IntScheme, BlockFloatScheme)):
        return f"there is no Triton product for {scheme.name} weights as they are"
    if isinstance(scheme, IntScheme) and scheme.group_size not in (None, columns) and (scheme.group_size or 0) % 32:
        return f"groups of {scheme.group_size} inputs are no multiple of 32"
    return None


def pack(quantized: QuantizedTensor, bias: Tensor | None = None) -> PackedWeight:
    """The layout of a weight that `obstacle` has nothing against, on the device of its codes.

    What is said of inputs in the scheme is not applied here. ValueError for a weight that `obstacle` refuses.
    """
    scheme = quantized.scheme
    rows, columns = quantized.codes.shape
    if reason := obstacle(scheme, columns):
        raise ValueError(reason)
    codes, high, bits, kind, scale_kind = quantized.codes, None, scheme.bits, "int", "float"
    scale = quantized.scale
    if isinstance(scheme, BlockFloatScheme):
        kind, scale_kind = f"fp{bits}", scheme.scale_type
        codes, scale = codes.view(torch.uint8), scale.view(torch.uint8)
    else:
        bits = bits if bits in (2, 3, 4) else 8
        codes = (codes.short() + (1 << (bits - 1))).to(torch.uint8)
    if bits == 3:
        high, codes = _fields(codes >> 2, 1, torch.int16, 16), codes & 3
    group = 0 if scheme.group_size in (None, columns) else (scheme.group_size or 0)
    field = 2 if bits == 3 else bits
    words = _fields(codes, field, torch.int32, 32 // field)
    groups = -(-words.shape[0] * (32 // field) * RUN // group) if group else 1
    return PackedWeight(
        words=words,
        high=high,
        scale=_grid(scale, groups),
        zero=None if quantized.zero_point is None else _grid(quantized.zero_point, groups),
        divisor=None if quantized.divisor is None else quantized.divisor.float().reshape(1),
        bias=bias,
        rows=rows,
        columns=columns,
        bits=bits,
        group=group,
        codes=kind,  # type: ignore[arg-type]
        scale_kind=scale_kind,  # type: ignore[arg-type]
    )


def stack(weights: Sequence[PackedWeight]) -> PackedWeight | None:
    """Experts' weights one after the other: tensors with one dimension more, the first. None where they differ."""
    first = weights[0]
    if any(_kind(weight) != _kind(first) for weight in weights):
        return None
    parts: dict[str, Any] = {
        name: None if getattr(first, name) is None else torch.stack([getattr(weight, name) for weight in weights])
        for name in _TENSORS
    }
    return replace(first, **parts)


def member(stacked: PackedWeight, number: int) -> PackedWeight:
    """One of the weights that were stacked, which shares their memory."""
    parts: dict[str, Any] = {
        name: None if getattr(stacked, name) is None else getattr(stacked, name)[number] for name in _TENSORS
    }
    return replace(stacked, **parts)


def _kind(weight: PackedWeight) -> tuple[object, ...]:
    parts = [getattr(weight, name) for name in _TENSORS]
    sizes = [None if part is None else (part.dtype, part.shape) for part in parts]
    return (*sizes, weight.columns, weight.bits, weight.group, weight.codes, weight.scale_kind)


def _fields(codes: Tensor, bits: int, dtype: torch.dtype, planes: int) -> Tensor:
    """Unsigned codes (rows, columns) uint8 in `planes` fields of `bits` bits: (chunks, rows, 16) of `dtype`."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % (planes * RUN)))
    runs = padded.view(rows, -1, planes, RUN)
    words = torch.zeros(runs.shape[1], rows, RUN, dtype=torch.int32, device=codes.device)
    for plane in range(planes):
        words |= runs[:, :, plane].transpose(0, 1).to(torch.int32) << (plane * bits)
    return words.to(dtype)


def _grid(values: Tensor, groups: int) -> Tensor:
    """(rows, some groups) as (groups, rows), with zeros for those that are missing."""
    return torch.nn.functional.pad(values, (0, groups - values.shape[1])).T.contiguous()
