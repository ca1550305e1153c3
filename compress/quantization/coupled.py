"""Coordinate descent on codes in which rows know of each other, by the curvature of the KL over a linear's outputs.

GPTQ's objective counts the error of every output alike and alone. To second order the KL is tr(B E A E^T), with A the
second moments of the inputs and B those of the gradients at the outputs (K-FAC, Martens and Grosse, arXiv:1503.05671;
for rounding see YAQA, arXiv:2505.22988): where two outputs pull the same way, the error of one may make up for the
other's. E = W* - Q is taken from the corrected weight W*, so that what undoes earlier layers' errors stays. Descent
begins at GPTQ's codes and keeps the scales.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from compress.kernels import dispatch
from compress.types import IntScheme, QuantizedTensor

SHRINKAGE = 0.3
"""Share by which what is off the diagonal of B is made smaller: it is an estimate, the diagonal decides nothing."""

SWEEPS = 3
"""One less is worse, more change nothing (docs/benchmarks.md)."""

ROWS_AT_A_TIME = 64


def descend(
    quantized: QuantizedTensor,
    target: Tensor,
    hessian: Tensor,
    curvature: Tensor,
    pruned: Tensor | None = None,
    *,
    sweeps: int = SWEEPS,
) -> QuantizedTensor:
    """The weight with codes that lower tr(B (target - Q) H (target - Q)^T), which no step can raise.

    target: (out, in) float32. hessian: H (in, in), positive definite. curvature: B (out, out) float32, at least
    semi-definite; an output of no curvature stays as it is. pruned: (out, in) bool, what stays zero.
    """
    scheme = quantized.scheme
    assert isinstance(scheme, IntScheme)
    coupling = _shrunk(curvature)
    own = coupling.diagonal()
    codes, scale = quantized.codes.clone(), quantized.scale.float()
    zero = torch.zeros_like(scale) if quantized.zero_point is None else quantized.zero_point.float()
    out, width = codes.shape
    group_of_column = torch.arange(width, dtype=torch.int32) // (width // scale.shape[1])
    pull = coupling @ ((target - quantized.dequantize().float()) @ hessian)
    felt = own > 0
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, out, ROWS_AT_A_TIME):
            rows = slice(start, min(start + ROWS_AT_A_TIME, out))
            local, steps = pull[rows].clone(), torch.zeros(rows.stop - start, width)
            for row in range(start, rows.stop):
                at, one = row - start, slice(row, row + 1)
                if not felt[row]:
                    continue
                gradient = local[at : at + 1] / own[row]
                wanted = gradient.clone()
                dispatch.coordinate_descent(
                    gradient, hessian, scale[one], zero[one], group_of_column, scheme.qmin, scheme.qmax, codes[one], 1,
                    threads=1, pruned=None if pruned is None else pruned[one],
                )  # fmt: skip
                steps[at] = (wanted - gradient)[0]
                local.addr_(coupling[rows, row], steps[at], alpha=-1)
            pull.addmm_(coupling[:, rows], steps, alpha=-1)
        if torch.equal(codes, before):
            break
    return dataclasses.replace(quantized, codes=codes)


def _shrunk(curvature: Tensor) -> Tensor:
    return (1 - SHRINKAGE) * curvature + SHRINKAGE * torch.diag(curvature.diagonal())
