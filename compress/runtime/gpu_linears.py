"""The linears of a decoder on a GPU: packed where a kernel takes them, and those with the same inputs joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import IntegrityError
from compress.formats.inputs import round_inputs
from compress.formats.tensors import HINT
from compress.kernels import gpu_linear
from compress.models.checkpoint import Checkpoint
from compress.runtime import triton_linears
from compress.runtime.native_reader import stored_parts
from compress.runtime.native_shape import EMBEDDING, HEAD, Part, Shape
from compress.runtime.native_weights import refuse_scales
from compress.runtime.protocol import LayerUse
from compress.types import BlockFloatScheme, InputScheme, QuantizedTensor, Scheme

Linear = Callable[[Tensor], Tensor]
"""x (tokens, in) -> (tokens, out) in the dtype of x."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One linear as it was read. weight (out, in): dense, or quantised with the scale of static inputs."""

    name: str
    weight: Tensor | QuantizedTensor
    input_scale: Tensor | None
    bias: Tensor | None

    @property
    def rows(self) -> int:
        return (self.weight.codes if isinstance(self.weight, QuantizedTensor) else self.weight).shape[0]

    @property
    def weights(self) -> int:
        """Number of weights, the bias counted."""
        codes = self.weight.codes if isinstance(self.weight, QuantizedTensor) else self.weight
        return codes.numel() + (0 if self.bias is None else self.rows)


class GpuLinears:
    """Reads linears of a checkpoint onto a device; `uses` is what each is multiplied by and holds there.

    The first of each scheme is multiplied and compared with its decoded weight, on the CPU.
    """

    def __init__(self, checkpoint: Checkpoint, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of dense weights, and of what enters all."""
        self.uses: dict[str, LayerUse] = {}
        self._checkpoint, self._shape, self._device, self._dtype = checkpoint, shape, device, dtype
        self._sizes = shape.linears()
        self._probed: set[Scheme] = set()

    def whole(self, name: str) -> Linear:
        """A stored linear.

        Raises:
            IntegrityError: what is stored contradicts its scheme or size.
            WorkError: a kernel that is wrong on this device.
        """
        return self._made([self._read(name)])

    def joined(self, parts: Sequence[Part]) -> Linear:
        """Linears with the same inputs, their outputs side by side: as one product where their schemes allow it.

        Raises:
            IntegrityError, WorkError: as `whole`.
        """
        stored = [self._read(name) for name in dict.fromkeys(part.linear for part in parts)]
        if _alike(stored):
            return self._made(stored)
        each = [self._made([one]) for one in stored]
        return lambda x: torch.cat([linear(x) for linear in each], -1)

    def head(self, embedding: Tensor) -> Linear:
        """The head; of tied weights the embedding (vocabulary, hidden), as it is, or packed as it is stored."""
        if not self._shape.tied:
            return self.whole(HEAD)
        if EMBEDDING in self._shape.schemes:
            linear = self._made([self._read(EMBEDDING, (self._shape.vocabulary, self._shape.hidden))])
            use = self.uses.pop(EMBEDDING)
        else:
            linear = self._dense([Stored(EMBEDDING, embedding, None, None)])
            use = self.uses.pop(EMBEDDING)
        self.uses[HEAD] = LayerUse(HEAD, (EMBEDDING,), use.kernel, use.weights, use.held_bytes, use.read_bytes)
        return linear

    def embedding(self) -> Tensor:
        """Rows of the embedding (vocabulary, hidden), decoded where they are packed."""
        if EMBEDDING not in self._shape.schemes:
            return self._checkpoint.read(f"{EMBEDDING}.weight").to(self._device, self._dtype)
        stored = self._read(EMBEDDING, (self._shape.vocabulary, self._shape.hidden)).weight
        assert isinstance(stored, QuantizedTensor)
        return stored.dequantize().to(self._device, self._dtype)

    def _read(self, name: str, size: tuple[int, int] | None = None) -> Stored:
        read, index = self._checkpoint.read, self._checkpoint.index
        size = self._sizes[name] if size is None else size
        bias = read(f"{name}.bias").to(self._dtype) if f"{name}.bias" in index else None
        scheme = self._shape.schemes.get(name)
        if scheme is None:
            return Stored(name, read(f"{name}.weight").to(self._device, self._dtype), None, bias)
        format = self._shape.format
        parts = stored_parts(self._checkpoint, name, format)
        quantized = format.unpack(parts, scheme)
        if tuple(quantized.codes.shape) != size:
            raise IntegrityError(f"{name} holds a weight of {tuple(quantized.codes.shape)}, not {size}", HINT)
        _refuse_damaged(name, quantized)
        return Stored(name, quantized, triton_linears.static_scale(format, parts, scheme), bias)

    def _made(self, stored: Sequence[Stored]) -> Linear:
        """One product of linears that are alike."""
        first = stored[0].weight
        if isinstance(first, Tensor):
            return self._dense(stored)
        scheme = first.scheme
        if gpu_linear.choose(scheme, first.codes.shape[1], self._device).name != "triton":
            return self._decoded(stored)
        quantized = _beside([one.weight for one in stored if isinstance(one.weight, QuantizedTensor)])
        linear = triton_linears.packed_linear(quantized, stored[0].input_scale, _bias(stored), self._device)
        if scheme not in self._probed:
            self._probed.add(scheme)
            self._probe(stored[0], first)
        self._note(stored, linear.kernel, linear.nbytes)
        return linear

    def _dense(self, stored: Sequence[Stored], kernel: str = "dense") -> Linear:
        weights = [one.weight for one in stored if isinstance(one.weight, Tensor)]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = _bias(stored)
        bias = None if bias is None else bias.to(self._device)
        held = sum(part.numel() * part.element_size() for part in (weight, bias) if part is not None)
        self._note(stored, f"{kernel} {str(self._dtype).removeprefix('torch.')}", held)
        return lambda x: functional.linear(x, weight, bias)

    def _decoded(self, stored: Sequence[Stored]) -> Linear:
        """A scheme that no kernel takes."""
        dense = []
        inputs: tuple[InputScheme, Tensor | None] | None = None
        for one in stored:
            assert isinstance(one.weight, QuantizedTensor)
            if one.weight.scheme.inputs is not None:
                inputs = one.weight.scheme.inputs, one.input_scale
            dense.append(Stored(one.name, one.weight.dequantize().to(self._device, self._dtype), None, one.bias))
        product = self._dense(dense, "decoded")
        if inputs is None:
            return product
        rounding = inputs
        return lambda x: product(round_inputs(x, *rounding))

    def _probe(self, stored: Stored, quantized: QuantizedTensor) -> None:
        linear = triton_linears.packed_linear(quantized, stored.input_scale, stored.bias, self._device)
        weight, inputs = quantized.dequantize().to(self._dtype), quantized.scheme.inputs

        def decoded(x: Tensor) -> Tensor:
            entering = x if inputs is None else round_inputs(x, inputs, stored.input_scale)
            return functional.linear(entering, weight, stored.bias)

        triton_linears.probe(stored.name, linear, decoded, weight, stored.bias, self._device)

    def _note(self, stored: Sequence[Stored], kernel: str, held: int) -> None:
        rows = sum(one.rows for one in stored)
        for one in stored:
            share = held * one.rows // rows
            read = share * self._shape.chosen // self._shape.experts if ".experts." in one.name else share
            self.uses[one.name] = LayerUse(one.name, (), kernel, one.weights, share, read)


def _refuse_damaged(name: str, quantized: QuantizedTensor) -> None:
    scheme, codes = quantized.scheme, quantized.codes
    if isinstance(scheme, BlockFloatScheme):
        refuse_scales(name, quantized.scale.view(torch.uint8), scheme.scale_type)
    elif quantized.nested is None:
        refuse_scales(name, quantized.scale, "float32")
    if codes.dtype == torch.float8_e4m3fn and bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise IntegrityError(f"{name}: a weight is NaN", HINT)


def _alike(stored: Sequence[Stored]) -> bool:
    """Whether their rows can be those of one weight."""
    found = [one.weight for one in stored]
    if not all(isinstance(weight, QuantizedTensor) for weight in found):
        return all(isinstance(weight, Tensor) for weight in found)
    quantized = [weight for weight in found if isinstance(weight, QuantizedTensor)]
    first, one = quantized[0], stored[0]
    return len(stored) == 1 or all(
        weight.scheme == first.scheme
        and weight.nested is None
        and weight.scale.dim() == 2
        and weight.codes.shape[0] * first.scale.shape[0] == first.codes.shape[0] * weight.scale.shape[0]
        and _equal(weight.divisor, first.divisor)
        and _equal(other.input_scale, one.input_scale)
        for weight, other in zip(quantized, stored, strict=True)
    )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _beside(weights: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The rows of weights that are alike, one after the other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    codes, scale = (torch.cat(parts) for parts in ([w.codes for w in weights], [w.scale for w in weights]))
    zeros = [weight.zero_point for weight in weights if weight.zero_point is not None]
    return QuantizedTensor(codes, scale, torch.cat(zeros) if zeros else None, first.scheme, first.divisor)


def _bias(stored: Sequence[Stored]) -> Tensor | None:
    if all(one.bias is None for one in stored):
        return None
    dtype = next(one.bias.dtype for one in stored if one.bias is not None)
    return torch.cat([torch.zeros(one.rows, dtype=dtype) if one.bias is None else one.bias for one in stored])
