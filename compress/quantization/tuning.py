"""Stored numbers as parameters that gradients move: scales of quantised weights and norms, as they will be stored.

A value is `start * (1 + change)` (of norms `start + unit * change`), rounded to the dtype that it is stored in; the
gradient goes through that rounding as if it were none (straight-through, Bengio et al., arXiv:1308.3432). Gradients
are handed over as those of the dense tensor, so that a model may run on plain dense weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.kernels.scales import stored_scale
from compress.quantization.grid import Grid, grouped
from compress.types import IntScheme, QuantizedTensor


class TunedScales:
    """The scales of one quantised weight; codes and zero points stay as they are until `take` replaces them.

    `change` (out, groups) float32 is what an optimiser moves, relative to the scale at the start.
    """

    def __init__(self, quantized: QuantizedTensor) -> None:
        assert isinstance(quantized.scheme, IntScheme)
        self.scheme, self.codes, self._zero = quantized.scheme, quantized.codes, quantized.zero_point
        self._start, self._dtype = quantized.scale.float(), quantized.scale.dtype
        self._reach = Grid(quantized.scale, quantized.zero_point, quantized.scheme).reach
        self.change = nn.Parameter(torch.zeros_like(self._start))

    def quantized(self) -> QuantizedTensor:
        """The weight as it would be stored now."""
        wanted = self._start * (1 + self.change.detach())
        return QuantizedTensor(self.codes, stored_scale(wanted, self._dtype, self._reach), self._zero, self.scheme)

    def take(self, codes: Tensor, zero_point: Tensor | None) -> None:
        """Has other codes (out, in) and zero points (out, groups) from now on, both int8."""
        self.codes, self._zero = codes, zero_point

    def dense(self) -> Tensor:
        """What that stands for: (out, in), see `QuantizedTensor.dequantize`."""
        return self.quantized().dequantize()

    def backward(self, gradient: Tensor) -> None:
        """Sets the gradient of `change` from that of the dense weight (out, in) float32."""
        levels = grouped(self.codes.float(), self.scheme)
        if self._zero is not None:
            levels -= self._zero.float().unsqueeze(-1)
        self.change.grad = (levels.mul_(grouped(gradient, self.scheme))).sum(-1).mul_(self._start)


class TunedVector:
    """A norm's weight or bias (n,), moved in units of its mean magnitude, or of 1 where it multiplies by 1 + w."""

    def __init__(self, stored: Tensor, *, offset: bool = False) -> None:
        self._start, self._dtype = stored.float(), stored.dtype
        self._unit = 1.0 if offset else max(float(self._start.abs().mean()), 1e-6)
        self.change = nn.Parameter(torch.zeros_like(self._start))

    def dense(self) -> Tensor:
        """The vector as it would be stored now, in its dtype."""
        return (self._start + self._unit * self.change.detach()).to(self._dtype)

    def backward(self, gradient: Tensor) -> None:
        """Sets the gradient of `change` from that of the vector."""
        self.change.grad = gradient * self._unit
