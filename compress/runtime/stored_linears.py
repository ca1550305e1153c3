"""Linears as a checkpoint stores them, and the rows of several as those of one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats.registry import Format
from compress.formats.tensors import HINT
from compress.models.checkpoint import Checkpoint
from compress.runtime.native_reader import stored_parts
from compress.runtime.native_weights import refuse_scales
from compress.types import FP8_TILE, BlockFloatScheme, Fp8Scheme, QuantizedTensor, Scheme


@dataclass(frozen=True, slots=True)
class Stored:
    """One linear as it was read. weight (out, in): dense, or quantised with the scale of static inputs."""

    name: str
    weight: Tensor | QuantizedTensor
    input_scale: Tensor | None
    bias: Tensor | None

    @property
    def codes(self) -> Tensor:
        """What has the weight's shape."""
        return self.weight.codes if isinstance(self.weight, QuantizedTensor) else self.weight

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def weights(self) -> int:
        """Number of weights, the bias counted."""
        return self.codes.numel() + (0 if self.bias is None else self.rows)


def read_quantized(checkpoint: Checkpoint, name: str, format: Format, scheme: Scheme, bias: Tensor | None) -> Stored:
    """A quantised linear, on the CPU.

    Raises:
        UserError: groups in activation order.
        IntegrityError: what is stored contradicts its scheme, or holds NaN.
    """
    parts = stored_parts(checkpoint, name, format)
    quantized = format.unpack(parts, scheme)
    _refuse_damaged(name, quantized)
    static = scheme.inputs is not None and not scheme.inputs.dynamic
    return Stored(name, quantized, format.input_scale(parts, scheme) if static else None, bias)


def alike(stored: Sequence[Stored]) -> bool:
    """Whether their rows can be those of one weight: one scheme, one scale of inputs, and scales that row by row say
    which is whose; FP8 tiles therefore end where a linear does."""
    if len(stored) == 1:
        return True
    found = [one.weight for one in stored]
    if not all(isinstance(weight, QuantizedTensor) for weight in found):
        return all(isinstance(weight, Tensor) for weight in found)
    quantized = [weight for weight in found if isinstance(weight, QuantizedTensor)]
    first = quantized[0]
    return all(
        weight.scheme == first.scheme
        and weight.nested is None
        and weight.scale.dim() == 2
        and _equal(weight.divisor, first.divisor)
        and _equal(one.input_scale, stored[0].input_scale)
        and ((one is stored[-1] or one.rows % FP8_TILE == 0) if _tiled(weight) else weight.scale.shape[0] == one.rows)
        for weight, one in zip(quantized, stored, strict=True)
    )


def beside(stored: Sequence[Stored]) -> QuantizedTensor:
    """The rows of quantised linears that are `alike`, one after the other."""
    weights = [one.weight for one in stored if isinstance(one.weight, QuantizedTensor)]
    first = weights[0]
    if len(weights) == 1:
        return first
    codes, scale = (torch.cat(parts) for parts in ([w.codes for w in weights], [w.scale for w in weights]))
    zeros = [weight.zero_point for weight in weights if weight.zero_point is not None]
    return QuantizedTensor(codes, scale, torch.cat(zeros) if zeros else None, first.scheme, first.divisor)


def bias_of(stored: Sequence[Stored]) -> Tensor | None:
    """Biases one after the other, zeros where a linear has none; None where all have none."""
    if all(one.bias is None for one in stored):
        return None
    dtype = next(one.bias.dtype for one in stored if one.bias is not None)
    return torch.cat([torch.zeros(one.rows, dtype=dtype) if one.bias is None else one.bias for one in stored])


def _tiled(weight: QuantizedTensor) -> bool:
    return isinstance(weight.scheme, Fp8Scheme) and weight.scheme.granularity == "tile"


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _refuse_damaged(name: str, quantized: QuantizedTensor) -> None:
    scheme, codes = quantized.scheme, quantized.codes
    if isinstance(scheme, BlockFloatScheme):
        refuse_scales(name, quantized.scale.view(torch.uint8), scheme.scale_type)
    elif quantized.nested is None:
        refuse_scales(name, quantized.scale, "float32")
    if codes.dtype == torch.float8_e4m3fn and bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise IntegrityError(f"{name}: a weight is NaN", HINT)
