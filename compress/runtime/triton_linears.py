"""Linears that stay packed on the GPU, their products computed by the Triton kernels.

What enters a linear is rounded as its scheme says: by a kernel where both sides are 8-bit codes of a whole row or tile,
else by torch before the product, which is then computed on bfloat16 or whatever the model runs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import UserError, WorkError
from compress.formats.inputs import round_inputs
from compress.kernels import gpu_linear
from compress.models.checkpoint import Checkpoint
from compress.runtime.native_reader import packed_linears
from compress.runtime.stored_linears import Stored, beside, bias_of, read_quantized
from compress.runtime.swapped import Swapped, exchange, place_of
from compress.types import InputScheme, QuantizedTensor, Scheme

TOLERANCE = 0.05
"""Largest difference of a probe from the decoded weight's product, over what the sizes of its row and of the inputs let
one expect of it. In bfloat16 both are rounded to 2^-9 of themselves, and may be 5 times as large as expected."""


class TritonLinear(nn.Module):
    """A linear whose weight `gpu_linear.pack` packed; `inputs` are rounded before it where the kernel does not.

    same: as in `gpu_linear.multiply`.
    """

    def __init__(
        self, packed: Any, kernel: str, inputs: tuple[InputScheme, Tensor | None] | None, same: bool = False
    ) -> None:
        super().__init__()
        self.packed = packed
        self._same = same
        self.kernel = kernel
        self._inputs = inputs

    @property
    def rounds_before(self) -> bool:
        """Whether inputs are rounded by torch before the product."""
        return self._inputs is not None

    @property
    def weights(self) -> int:
        """Number of weights, the bias counted."""
        return int(self.packed.rows * self.packed.columns + (0 if self.packed.bias is None else self.packed.rows))

    @property
    def nbytes(self) -> int:
        """Bytes in memory, all of which a token reads."""
        return int(self.packed.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in the dtype of x."""
        if self._inputs is not None:
            x = round_inputs(x, *self._inputs)
        return gpu_linear.multiply(self.packed, x, self._same)


def refuse_wrong(name: str, found: Tensor, wanted: Tensor, size: Tensor) -> None:
    """Raises WorkError where `found` is not `wanted`; all (tokens, out), size: what one expects of an output."""
    error = float(((found - wanted).abs() / size.clamp(min=1e-30)).max())
    if not error <= TOLERANCE:
        raise WorkError(
            f"{name}: the Triton product of {len(found)} tokens differs from that of the decoded weight by "
            f"{error:.1e} of what one expects of an output",
            "use --kernel reference, and report this GPU and the versions that `compress doctor` lists",
        )


class Packer:
    """Packs linears for a device. The first of each scheme, alone and joined with so many, is probed."""

    def __init__(self, device: torch.device, same: bool = False) -> None:
        """same: as in `gpu_linear.multiply`."""
        self._device, self._same = device, same
        self._probed: set[tuple[Scheme, int]] = set()

    def __call__(self, stored: Sequence[Stored], dtype: torch.dtype) -> TritonLinear:
        """One linear of those that are `alike`, of a scheme that `gpu_linear.choose` takes; dtype: of its inputs.

        Raises:
            WorkError: a product is not that of the decoded weights on this device.
        """
        quantized, bias, scale, device = beside(stored), bias_of(stored), stored[0].input_scale, self._device
        scheme = quantized.scheme
        static = None if scale is None else scale.to(device)
        moved = QuantizedTensor(
            quantized.codes.to(device),
            quantized.scale.to(device),
            None if quantized.zero_point is None else quantized.zero_point.to(device),
            scheme,
            None if quantized.divisor is None else quantized.divisor.to(device),
        )
        packed, rounds = gpu_linear.pack(moved, static, None if bias is None else bias.to(device))
        before = None if rounds or scheme.inputs is None else (scheme.inputs, static)
        linear = TritonLinear(packed, f"triton {scheme.label}", before, self._same)
        if (scheme, len(stored)) not in self._probed:
            self._probed.add((scheme, len(stored)))
            self._probe(linear, stored, bias, dtype)
        return linear

    def _probe(self, linear: TritonLinear, stored: Sequence[Stored], bias: Tensor | None, dtype: torch.dtype) -> None:
        """Products of one and of three tokens beside those of the weights, each decoded on its own, on the CPU."""
        weights = [one.weight for one in stored if isinstance(one.weight, QuantizedTensor)]
        weight, inputs = torch.cat([one.dequantize() for one in weights]).to(dtype), weights[0].scheme.inputs
        columns = weight.shape[1]
        x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        with torch.inference_mode():
            entering = x if inputs is None else round_inputs(x, inputs, stored[0].input_scale)
            wanted = functional.linear(entering, weight, None if bias is None else bias.to(dtype)).float()
            of_bias = 0 if bias is None else bias.float().abs()
            rows = weight.float().norm(dim=1) * (columns**-0.5)
            for tokens in (1, 3):
                found = linear(x[:tokens].to(self._device)).float().cpu()
                size = rows * x[:tokens].float().norm(dim=1, keepdim=True) + of_bias
                refuse_wrong(stored[0].name, found, wanted[:tokens], size)


def swap(model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> Swapped:
    """Exchanges the quantised linears of a dense model that kernels on `device` compute.

    Raises:
        IntegrityError: what is stored contradicts its scheme, or holds NaN.
        WorkError: a product is not that of the decoded weight on this device.
    """
    format, schemes = packed_linears(checkpoint)
    modules = dict(model.named_modules())
    found, packer = Swapped({}, {}), Packer(device)
    for name, scheme in schemes.items():
        place = place_of(name, model, modules)
        module = modules.get(place)
        if not isinstance(module, nn.Linear):
            found.dense[name] = "transformers keeps it in another form than a linear of its own"
            continue
        choice = gpu_linear.choose(scheme, module.in_features, device)
        if choice.name != "triton":
            found.dense[name] = choice.reason
            continue
        bias = None if module.bias is None else module.bias.detach()
        try:
            stored = read_quantized(checkpoint, name, format, scheme, bias)
        except UserError as error:  # groups in activation order: decoded weights carry them
            found.dense[name] = error.message
            continue
        linear = packer([stored], module.weight.dtype)
        exchange(modules, place, linear)
        found.linears[place] = linear
    return found
