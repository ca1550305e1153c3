"""Quantised linears for the native products: what each scheme stores, and what is repacked from it, a scheme a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import IntegrityError
from compress.formats import bitsandbytes, fp4, modelopt
from compress.formats.block_floats import GLOBAL_SCALE, codes_name, scale_dtype
from compress.formats.fp8 import E4M3
from compress.formats.int_packed import pack_bits, unpack_bits
from compress.formats.layouts import input_scale_name
from compress.formats.registry import Format
from compress.formats.tensors import HINT
from compress.kernels import packed_linear
from compress.kernels.packed_linear import FloatWeight
from compress.models.checkpoint import Checkpoint
from compress.runtime.native_reader import stored_parts
from compress.types import (
    E2M1,
    FP8_TILE,
    NF4,
    BlockFloatScheme,
    Fp8Scheme,
    IntScheme,
    NormalFloatScheme,
    QuantizedTensor,
    Scheme,
)

DENSE = (torch.bfloat16, torch.float16, torch.float32)
Expected = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
"""Shape and possible dtypes of stored tensors by local name."""
IntWords = tuple[Tensor, Tensor, Tensor | None]
"""Words (out, ...) int32, scales (out, groups), zero points (out, groups) int8 or None."""
_E2M1 = (*E2M1, *(-value for value in E2M1))


def expected(format: Format, scheme: Scheme, out: int, width: int) -> Expected:
    """What a linear of this size stores."""
    if format.layout is not None:
        return {part: (size, (dtype,)) for part, (size, dtype) in format.layout(scheme, out, width).items()}
    if format.name == "bitnet":
        return {"weight": ((out // 4, width), (torch.uint8,)), "weight_scale": ((1,), DENSE)}
    found: Expected = {}
    if scheme.inputs is not None and not scheme.inputs.dynamic:
        found[input_scale_name(scheme.inputs)] = ((1,), DENSE)
    if isinstance(scheme, Fp8Scheme):
        return {**found, "weight": ((out, width), (E4M3,)), "weight_scale": (scheme.scale_shape(out, width), DENSE)}
    assert not isinstance(scheme, NormalFloatScheme)
    groups = scheme.groups(width)
    if isinstance(scheme, BlockFloatScheme):
        stored, dtype = (width // 2, torch.uint8) if scheme.bits == 4 else (width, E4M3)
        found[codes_name(scheme)] = ((out, stored), (dtype,))
        found["weight_scale"] = ((out, groups), (scale_dtype(scheme),))
        return {**found, GLOBAL_SCALE: ((1,), DENSE)} if scheme.spans_matrix else found
    found["weight_scale"] = ((out, groups), DENSE)
    if scheme.inputs is not None:  # a byte each, whatever their bits
        return {**found, "weight": ((out, width), (torch.int8,))}
    found["weight_packed"] = ((out, -(-width * scheme.bits // 32)), (torch.int32,))
    found["weight_shape"] = ((2,), (torch.int64,))
    if not scheme.symmetric:
        found["weight_zero_point"] = ((-(-out * scheme.bits // 32), groups), (torch.int32,))
    return found


def free_parts(format: Format) -> tuple[str, ...]:
    """Local names of bytes that a linear stores as well, as many as they are."""
    return (bitsandbytes.STATE,) if format.name == "bitsandbytes" else ()


def input_scale(checkpoint: Checkpoint, format: Format, name: str, scheme: Scheme) -> float:
    """What calibration stored of a linear's inputs; 0 where they are dynamic or not rounded.

    Raises:
        IntegrityError: it is missing, or no number to divide by.
    """
    if scheme.inputs is None or scheme.inputs.dynamic:
        return 0.0
    parts = {part: f"{name}.{part}" for part in ("input_scale", "input_global_scale")}
    stored = {part: checkpoint.read(full) for part, full in parts.items() if full in checkpoint.index}
    return float(format.input_scale(stored, scheme))


class Stored:
    """A quantised linear of a checkpoint, read once, of which rows are repacked."""

    def __init__(
        self, checkpoint: Checkpoint, format: Format, name: str, size: tuple[int, int], scheme: Scheme
    ) -> None:
        """size: (out, in).

        Raises:
            IntegrityError: what is stored contradicts the scheme or the size, or a scale is no number or 2^96 or more.
        """
        self._name, self._size, self._scheme = name, size, scheme
        self._input_scale = input_scale(checkpoint, format, name, scheme)
        self._integers: IntWords | None = None
        self._floats: FloatWeight | None = None
        if isinstance(scheme, IntScheme):
            self._integers = _integers(checkpoint, format, name, size, scheme)
            refuse_scales(name, self._integers[1], "float32")
            return
        stored = stored_parts(checkpoint, name, format)
        if format.name == "modelopt" and isinstance(scheme, BlockFloatScheme):
            self._floats = _modelopt_blocks(stored, scheme)
        else:
            quantized = format.unpack(stored, scheme)
            if tuple(quantized.codes.shape) != size:
                raise IntegrityError(f"{name} holds a weight of {tuple(quantized.codes.shape)}, not {size}", HINT)
            self._floats = float_weight(quantized)
        refuse_scales(name, self._floats.scale, self._floats.scale_type)

    def pack(self, rows: slice, bias: Tensor | None) -> Any:
        """Some of its rows, and their part of the bias, repacked.

        Raises:
            IntegrityError: a weight is NaN.
        """
        part = None if bias is None else bias[rows]
        if self._integers is not None:
            assert isinstance(self._scheme, IntScheme)
            words, scale, zero = self._integers
            return packed_linear.pack_codes(
                words[rows],
                scale[rows],
                None if zero is None else zero[rows],
                self._size[1],
                self._scheme,
                part,
                input_scale=self._input_scale,
            )
        assert self._floats is not None
        weight = self._floats.rows(rows.start, rows.stop)
        try:
            return packed_linear.pack_floats(weight, self._scheme.inputs, part, input_scale=self._input_scale)
        except ValueError as error:
            raise IntegrityError(f"{self._name}: {error}", HINT) from error


def refuse_scales(name: str, scale: Tensor, scale_type: str) -> None:
    """Of float32, and kinds of it, or the codes of `FloatWeight`. Larger scales overflow where products are rounded.

    Raises:
        IntegrityError: one is no number, or 2^96 or more.
    """
    if scale_type == "e8m0":
        sound = scale < 127 + 96
    elif scale_type == "e4m3":
        sound = scale & 0x7F != 0x7F
    else:
        sound = scale.abs() < 2.0**96
    if not bool(sound.all()):
        raise IntegrityError(f"{name}.weight_scale holds NaN, infinity or a number of 2^96 or more", HINT)


def _integers(checkpoint: Checkpoint, format: Format, name: str, size: tuple[int, int], scheme: IntScheme) -> IntWords:
    if format.layout is not None or format.name == "bitnet" or scheme.inputs is not None:
        found = format.unpack(stored_parts(checkpoint, name, format), scheme)
        return pack_bits(found.codes, scheme.bits), _int_scale(found), found.zero_point
    if checkpoint.read(f"{name}.weight_shape").tolist() != list(size):
        raise IntegrityError(f"{name}.weight_shape is not {size}", HINT)
    zero = None
    if not scheme.symmetric:
        zero = unpack_bits(checkpoint.read(f"{name}.weight_zero_point").T, scheme.bits, size[0]).T
    return checkpoint.read(f"{name}.weight_packed"), checkpoint.read(f"{name}.weight_scale"), zero


def _fp8(quantized: QuantizedTensor) -> FloatWeight:
    scheme, (out, width), scale = quantized.scheme, quantized.codes.shape, quantized.scale.float()
    assert isinstance(scheme, Fp8Scheme)
    if scheme.granularity == "tile":
        scale = scale.repeat_interleave(FP8_TILE, 0)[:out]
    group = FP8_TILE if scheme.granularity == "tile" else width
    scale = scale.reshape(-1, width // group).expand(out, -1)
    return FloatWeight(_words(quantized.codes), width, None, scale, "float32", group)


def _blocks(quantized: QuantizedTensor) -> FloatWeight:
    """Powers of two for scales change no digit of a value, so that it needs no rounding to bfloat16."""
    scheme, codes, scale = quantized.scheme, quantized.codes, quantized.scale.view(torch.uint8)
    assert isinstance(scheme, BlockFloatScheme)
    words, table = (_words(fp4.pack(codes)), torch.tensor(_E2M1)) if scheme.bits == 4 else (_words(codes), None)
    weight = FloatWeight(words, codes.shape[1], table, scale, scheme.scale_type, scheme.group_size)
    if quantized.divisor is None:
        return weight
    return replace(weight, dtype=torch.bfloat16, divisor=float(quantized.divisor))


def _modelopt_blocks(stored: Mapping[str, Tensor], scheme: BlockFloatScheme) -> FloatWeight:
    """NVFP4 with what its scales are multiplied by, whatever that is."""
    codes, scale, factor = modelopt.nvfp4(stored, scheme)
    weight = _blocks(QuantizedTensor(codes, scale, None, scheme))
    return replace(weight, dtype=torch.bfloat16, factor=float(factor))


def _normal(quantized: QuantizedTensor) -> FloatWeight:
    scheme, nested = quantized.scheme, quantized.nested
    assert isinstance(scheme, NormalFloatScheme)
    assert nested is not None
    words, scale = _words(fp4.pack(quantized.codes)), nested.decode(quantized.scale)
    width = quantized.codes.shape[1]
    return FloatWeight(words, width, torch.tensor(NF4), scale, "float32", scheme.group_size, nested.dtype)


_FLOATS: Mapping[type, Callable[[QuantizedTensor], FloatWeight]] = {
    Fp8Scheme: _fp8,
    BlockFloatScheme: _blocks,
    NormalFloatScheme: _normal,
}


def float_weight(quantized: QuantizedTensor) -> FloatWeight:
    """What the native product reads of a weight whose codes are floats."""
    return _FLOATS[type(quantized.scheme)](quantized)


def repack(quantized: QuantizedTensor, bias: Tensor | None = None, input_scale: float = 0.0) -> Any:
    """A quantised weight for the native products. input_scale: what calibration found where its inputs are static."""
    scheme = quantized.scheme
    if not isinstance(scheme, IntScheme):
        weight = float_weight(quantized)
        return packed_linear.pack_floats(weight, scheme.inputs, bias, input_scale=input_scale)
    words, width = pack_bits(quantized.codes, scheme.bits), quantized.codes.shape[1]
    scale, zero = _int_scale(quantized), quantized.zero_point
    return packed_linear.pack_codes(words, scale, zero, width, scheme, bias, input_scale=input_scale)


def _int_scale(quantized: QuantizedTensor) -> Tensor:
    """Kernels that multiply integers apply it in float32."""
    return quantized.scale if quantized.scheme.inputs is None else quantized.scale.float()


def _words(codes: Tensor) -> Tensor:
    """Bytes (out, n) as int32 words (out, n / 4 rounded up)."""
    bytes_of = codes.view(torch.uint8)
    return functional.pad(bytes_of, (0, -bytes_of.shape[1] % 4)).contiguous().view(torch.int32)


def weight_name(scheme: Scheme | None, bits: int) -> str:
    """What reports call the weights that a product reads; bits: of the repacked weight."""
    if scheme is None:
        return {16: "bfloat16", 32: "float32"}.get(bits, f"int{bits}")
    if isinstance(scheme, IntScheme):
        return f"int{bits}"
    return "fp8" if isinstance(scheme, Fp8Scheme) else scheme.name.removesuffix("A16").lower()


def input_name(scheme: Scheme | None) -> str:
    """What reports call the inputs that it meets where they are not in 8 bits."""
    rounded = packed_linear.rounding(None if scheme is None else scheme.inputs)
    return "float32" if rounded == "none" else f"float32 of {'int8' if rounded == 'narrow' else rounded}"
