"""Codes and zero points moved by whole steps, where a quadratic model of the KL wants them at least that far away.

Of a weight with gradient g, curvature h and step s the best real move is g / h, that is g / (h s) steps: its promise.
A step pays to second order where that is over one half; where many move at a time, only high promises do. h is the
diagonal of the softmax's covariance carried back to the weights; of codes it is taken as a product of a factor for each
output and one for each input (Shazeer and Stern, arXiv:1804.04235), because few draws know little of a single weight.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from compress.quantization.grid import grouped
from compress.types import IntScheme, QuantizedTensor


class Curvature:
    """The curvature by each weight of a linear, and by the shift of each group, from draws that are added."""

    def __init__(self, shape: torch.Size, scheme: IntScheme) -> None:
        out, width = shape
        self._scheme, self._tokens = scheme, 0
        self._rows, self._columns = torch.zeros(out), torch.zeros(width)
        self._groups = torch.zeros(out, scheme.groups(width))

    def add(self, drawn: Tensor, tokens: int) -> None:
        """drawn: (out, in) float32, what a draw of the covariance for so many tokens gives at the dense weight."""
        squares = drawn.square()
        self._rows += squares.sum(1)
        self._columns += squares.sum(0)
        self._groups += grouped(drawn, self._scheme).sum(-1).square_()
        self._tokens += tokens

    def of_weights(self) -> Tensor:
        """(out, in) float32, per token."""
        total = float(self._rows.sum())
        return torch.outer(self._rows, self._columns).div_(max(total, 1e-30) * self._tokens)

    def of_groups(self) -> Tensor:
        """(out, groups) float32, per token: where all weights of a group shift together."""
        return self._groups / self._tokens


def code_promise(quantized: QuantizedTensor, gradient: Tensor, curvature: Tensor, fixed: Tensor | None) -> Tensor:
    """(out, in) float32, signed as the code would move; 0 where it cannot.

    gradient, curvature: (out, in) float32 by the dense weight. fixed: (out, in) bool, what must not move.
    """
    scheme, scale = _integers(quantized), quantized.scale.float()
    step = scale.repeat_interleave(gradient.shape[1] // scale.shape[1], 1)
    promise = _promise(gradient, curvature, step, quantized.codes, scheme)
    return promise if fixed is None else promise.masked_fill_(fixed, 0.0)


def zero_point_promise(quantized: QuantizedTensor, gradient: Tensor, curvature: Tensor, fixed: Tensor | None) -> Tensor:
    """(out, groups) float32, signed as the zero point would move; 0 where it cannot, or all are without.

    gradient, fixed: as above; with one fixed weight the whole group stays. curvature: (out, groups) float32.
    """
    if quantized.zero_point is None:
        return torch.zeros_like(curvature)
    scheme = _integers(quantized)
    down = grouped(gradient, scheme).sum(-1).neg_()  # a higher zero point shifts its group down
    promise = _promise(down, curvature, quantized.scale.float(), quantized.zero_point, scheme)
    return promise if fixed is None else promise.masked_fill_(grouped(fixed, scheme).any(-1), 0.0)


def moved(quantized: QuantizedTensor, codes: Tensor, zero_points: Tensor, least: float) -> QuantizedTensor:
    """The weight with everything a step further that promises at least so much; promises as above."""
    zero = quantized.zero_point
    if zero is not None:
        zero = zero + _steps(zero_points, least)
    return dataclasses.replace(quantized, codes=quantized.codes + _steps(codes, least), zero_point=zero)


def _promise(gradient: Tensor, curvature: Tensor, step: Tensor, at: Tensor, scheme: IntScheme) -> Tensor:
    steps = gradient.neg().div_((curvature * step).clamp_(min=torch.finfo(torch.float32).tiny))
    beyond = at + steps.sign()
    outside = (beyond < scheme.qmin) | (beyond > scheme.qmax) | (curvature <= 0) | (step <= 0)
    return steps.masked_fill_(outside, 0.0)


def _steps(promise: Tensor, least: float) -> Tensor:
    return torch.where(promise.abs() >= least, promise.sign(), 0.0).to(torch.int8)


def _integers(quantized: QuantizedTensor) -> IntScheme:
    assert isinstance(quantized.scheme, IntScheme)
    return quantized.scheme
