"""Weights for the products of 8-bit inputs and 8-bit weights, their codes as they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.types import FP8_TILE, Fp8Scheme, InputScheme, IntScheme, QuantizedTensor, Scheme


@dataclass(frozen=True, eq=False, slots=True)
class RoundedWeight:
    """codes (rows, columns) int8, or uint8 for FP8; scale float32; input_scale (1,) where inputs are static."""

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    bias: Tensor | None
    scheme: IntScheme | Fp8Scheme
    inputs: InputScheme

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        parts = (self.codes, self.scale, self.input_scale, self.bias)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def obstacle(scheme: Scheme, columns: int) -> str | None:
    """Why these products do not take weights of a scheme; None if they do."""
    if isinstance(scheme, Fp8Scheme):
        tiles = scheme.inputs.granularity == "group" and scheme.inputs.group_size == FP8_TILE
        if tiles != (scheme.granularity == "tile"):
            return "FP8 tiles of weights and groups of inputs go together here"
        return None
    if isinstance(scheme, IntScheme) and scheme.inputs is not None and scheme.bits == 8:
        whole_rows = scheme.group_size in (None, columns) and scheme.symmetric
        if scheme.inputs.granularity != "group" and whole_rows and not scheme.inputs.narrow:
            return None
    return f"{scheme.label} is no product of 8-bit codes with one scale for each token and row"


def pack(quantized: QuantizedTensor, input_scale: Tensor | None = None, bias: Tensor | None = None) -> RoundedWeight:
    """A weight that `obstacle` has nothing against, its codes as they are. ValueError for another."""
    scheme = quantized.scheme
    if reason := obstacle(scheme, quantized.codes.shape[1]):
        raise ValueError(reason)
    assert isinstance(scheme, (IntScheme, Fp8Scheme))
    assert scheme.inputs is not None
    codes = quantized.codes.view(torch.uint8) if isinstance(scheme, Fp8Scheme) else quantized.codes
    scale = quantized.scale.float().contiguous()
    kept = None if input_scale is None else input_scale.float().reshape(1)
    if scheme.inputs.granularity == "tensor" and kept is None:
        raise ValueError("static inputs need their scale")
    return RoundedWeight(codes.contiguous(), scale, kept, bias, scheme, scheme.inputs)
