"""Linears of a transformers module that stay packed on the GPU, their products computed by the Triton kernels.

What enters a linear is rounded as its scheme says: in the kernel for int8 and FP8, before it for 4-bit floats, whose
products are computed on bfloat16 or whatever the model runs in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError, WorkError
from compress.formats.inputs import round_inputs
from compress.formats.registry import Format
from compress.kernels import gpu_linear
from compress.models.checkpoint import Checkpoint
from compress.runtime.native_reader import packed_linears, stored_parts
from compress.runtime.swapped import Swapped, exchange, place_of
from compress.types import InputScheme, QuantizedTensor, Scheme

TOLERANCE = 0.05
"""Largest difference of a probe from the decoded weight's product, over what the sizes of its row and of the inputs let
one expect of it. In bfloat16 both are rounded to 2^-9 of themselves, and may be 5 times as large as expected."""


class TritonLinear(nn.Module):
    """A linear whose weight `gpu_linear.pack` packed; `inputs` are rounded before it where the kernel does not."""

    def __init__(self, packed: Any, kernel: str, inputs: tuple[InputScheme, Tensor | None] | None) -> None:
        super().__init__()
        self.packed = packed
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
        return gpu_linear.multiply(self.packed, x)


def swap(model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> Swapped:
    """Exchanges the quantised linears of a dense model that kernels on `device` compute, and probes one per scheme.

    Raises:
        WorkError: a product is not that of the decoded weight on this device.
    """
    format, schemes = packed_linears(checkpoint)
    modules = dict(model.named_modules())
    found, probed = Swapped({}, {}), set()
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
        parts = stored_parts(checkpoint, name, format)
        try:
            quantized = format.unpack(parts, scheme)
        except UserError as error:  # groups in activation order: decoded weights carry them
            found.dense[name] = error.message
            continue
        bias = None if module.bias is None else module.bias.detach()
        linear = packed_linear(quantized, static_scale(format, parts, scheme), bias, device)
        if scheme not in probed:
            probe(name, linear, module, module.weight, bias, device)
            probed.add(scheme)
        exchange(modules, place, linear)
        found.linears[place] = linear
    return found


def static_scale(format: Format, parts: dict[str, Tensor], scheme: Scheme) -> Tensor | None:
    """The stored scale (1,) of static inputs."""
    if scheme.inputs is None or scheme.inputs.dynamic:
        return None
    return format.input_scale(parts, scheme)


def packed_linear(
    quantized: QuantizedTensor, input_scale: Tensor | None, bias: Tensor | None, device: torch.device
) -> TritonLinear:
    """A linear over a weight that `gpu_linear.choose` takes there; input_scale as `static_scale` gives it."""
    scheme = quantized.scheme
    inputs = scheme.inputs
    stored = None if input_scale is None else input_scale.to(device)
    moved = QuantizedTensor(
        quantized.codes.to(device),
        quantized.scale.to(device),
        None if quantized.zero_point is None else quantized.zero_point.to(device),
        scheme,
        None if quantized.divisor is None else quantized.divisor.to(device),
    )
    packed, rounds = gpu_linear.pack(moved, stored, None if bias is None else bias.to(device))
    return TritonLinear(packed, f"triton {scheme.label}", None if rounds or inputs is None else (inputs, stored))


def probe(
    name: str,
    linear: TritonLinear,
    decoded: Callable[[Tensor], Tensor],
    weight: Tensor,
    bias: Tensor | None,
    device: torch.device,
) -> None:
    """Compares products of one and of three tokens with those of the decoded weight, whose inputs are rounded as well.

    decoded: that product on the CPU, in the dtype of `weight` (out, in).

    Raises:
        WorkError: a product is not that of the decoded weight on this device.
    """
    columns = weight.shape[1]
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.inference_mode():
        wanted = decoded(x).float()
        of_bias = 0 if bias is None else bias.float().abs()
        rows = weight.float().norm(dim=1) * (columns**-0.5)
        for tokens in (1, 3):
            found = linear(x[:tokens].to(device)).float().cpu()
            size = rows * x[:tokens].float().norm(dim=1, keepdim=True) + of_bias
            error = float(((found - wanted[:tokens]).abs() / size.clamp(min=1e-30)).max())
            if not error <= TOLERANCE:
                raise WorkError(
                    f"{name}: the Triton product of {tokens} tokens differs from that of the decoded weight by "
                    f"{error:.1e} of what one expects of an output",
                    "use --kernel reference, and report this GPU and the versions that `compress doctor` lists",
                )
