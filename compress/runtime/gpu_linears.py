"""The linears of a decoder on a GPU: packed where a kernel takes them, and those with the same inputs joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import IntegrityError
from compress.formats.inputs import round_inputs
from compress.formats.tensors import HINT
from compress.kernels import gpu_linear
from compress.models.checkpoint import Checkpoint
from compress.runtime.native_shape import EMBEDDING, HEAD, Part, Shape
from compress.runtime.protocol import LayerUse
from compress.runtime.stored_linears import Stored, alike, bias_of, read_quantized
from compress.runtime.triton_linears import Packer, refuse_wrong
from compress.types import QuantizedTensor

Linear = Callable[[Tensor], Tensor]
"""x (tokens, in) -> (tokens, out) in the dtype of x."""


class GpuLinears:
    """Reads linears of a checkpoint onto a device; `uses` is what each is multiplied by and holds there."""

    def __init__(
        self, checkpoint: Checkpoint, shape: Shape, device: torch.device, dtype: torch.dtype, same: bool = False
    ) -> None:
        """dtype: of dense weights, and of what enters all. same: as in `gpu_linear.multiply`, for all of them."""
        self.uses: dict[str, LayerUse] = {}
        self._checkpoint, self._shape, self._device, self._dtype = checkpoint, shape, device, dtype
        self._sizes = shape.linears()
        self._packed, self._same, self._probed = Packer(device, same), same, False

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
        if alike(stored):
            return self._made(stored)
        each = [self._made([one]) for one in stored]
        return lambda x: torch.cat([linear(x) for linear in each], -1)

    def head(self, embedding: Tensor) -> Linear:
        """The head; of tied weights the embedding (vocabulary, hidden), as it is, or packed as it is stored."""
        if not self._shape.tied:
            return self.whole(HEAD)
        if EMBEDDING in self._shape.schemes:
            linear = self._made([self._read(EMBEDDING, (self._shape.vocabulary, self._shape.hidden))])
        else:
            linear = self._dense([Stored(EMBEDDING, embedding, None, None)])
        self.uses[HEAD] = replace(self.uses.pop(EMBEDDING), name=HEAD, aliases=(EMBEDDING,))
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
        stored = read_quantized(self._checkpoint, name, self._shape.format, scheme, bias)
        if tuple(stored.codes.shape) != size:
            raise IntegrityError(f"{name} holds a weight of {tuple(stored.codes.shape)}, not {size}", HINT)
        return stored

    def _made(self, stored: Sequence[Stored]) -> Linear:
        """One product of linears that are alike."""
        first = stored[0].weight
        if isinstance(first, Tensor):
            return self._dense(stored)
        if gpu_linear.choose(first.scheme, first.codes.shape[1], self._device).name != "triton":
            return self._decoded(stored, first)
        linear = self._packed(stored, self._dtype)
        self._note(stored, linear.kernel, linear.nbytes)
        return linear

    def _dense(self, stored: Sequence[Stored], kernel: str = "dense") -> Linear:
        weights = [one.weight for one in stored if isinstance(one.weight, Tensor)]
        weight = weights[0].contiguous() if len(weights) == 1 else torch.cat(weights)
        bias = bias_of(stored)
        bias = None if bias is None else bias.to(self._device)
        held = sum(part.numel() * part.element_size() for part in (weight, bias) if part is not None)
        self._note(stored, f"{kernel} {str(self._dtype).removeprefix('torch.')}", held)
        if self._same:
            self._probe(stored[0].name, weight)
            return lambda x: gpu_linear.multiply_dense(weight, x, bias)
        return lambda x: functional.linear(x, weight, bias)

    def _probe(self, name: str, weight: Tensor) -> None:
        """The first dense product, of some rows, beside torch's on the CPU."""
        if self._probed:
            return
        self._probed, some = True, weight[:64].cpu()
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(self._dtype)
        found = gpu_linear.multiply_dense(weight[:64], x.to(self._device), None).float().cpu()
        size = some.float().norm(dim=1) * x.float().norm(dim=1, keepdim=True) * weight.shape[1] ** -0.5
        refuse_wrong(name, found, functional.linear(x.float(), some.float()), size)

    def _decoded(self, stored: Sequence[Stored], first: QuantizedTensor) -> Linear:
        """A scheme that no kernel takes."""
        dense = [
            replace(one, weight=one.weight.dequantize().to(self._device, self._dtype))
            for one in stored
            if isinstance(one.weight, QuantizedTensor)
        ]
        product, inputs, scale = self._dense(dense, "decoded"), first.scheme.inputs, stored[0].input_scale
        if inputs is None:
            return product
        static = None if scale is None else scale.to(self._device)  # nothing is copied from the host in a recorded step
        return lambda x: product(round_inputs(x, inputs, static))

    def _note(self, stored: Sequence[Stored], kernel: str, held: int) -> None:
        rows = sum(one.rows for one in stored)
        for one in stored:
            share = held * one.rows // rows
            read = share * self._shape.chosen // self._shape.experts if ".experts." in one.name else share
            self.uses[one.name] = LayerUse(one.name, (), kernel, one.weights, share, read)
