"""Weights and inputs to quantise, and what rounding costs, worked out in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from compress.calibration.statistics import Drift, LinearStats
from compress.quantization import gptq
from compress.quantization.configs import GptqConfig
from compress.types import IntScheme, QuantizedTensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs x (tokens, in) whose channels go together and differ in size, as in a transformer."""
    mixing = torch.eye(width) + 1.5 * normal(width, width, seed=seed + 1) / width**0.5
    sizes = torch.exp(0.7 * normal(width, seed=seed + 2))
    return normal(tokens, width, seed=seed) @ mixing * sizes


def stats_of(x: Tensor, originals: Tensor | None = None) -> LinearStats:
    """The statistics of inputs (tokens, in), by float64 products."""
    exact = x.double()
    hessian = (exact.T @ exact / len(x)).float()
    if originals is None:
        return LinearStats(hessian, None, len(x))
    difference = ((originals.double() - exact).T @ exact / len(x)).float()
    return LinearStats(hessian, Drift(difference, hessian, len(x)), len(x))


def prepared(stats: LinearStats, config: GptqConfig) -> gptq.Preconditioner:
    """What linears of one input share."""
    with ThreadPoolExecutor(1) as pool:
        return gptq.Preconditioner(stats, config, pool)


def objective(target: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """(w - q) H (w - q)^T for every row, float64; q as the float32 product of codes and stored scale."""
    error = target.double() - values(quantized)
    return ((error @ hessian.double()) * error).sum(1)


def values(quantized: QuantizedTensor) -> Tensor:
    """(codes - zero_point) * scale in float64, one group after the other."""
    out, width = quantized.codes.shape
    groups = quantized.scale.shape[1]
    size = width // groups
    found = torch.empty(out, width, dtype=torch.float64)
    for group in range(groups):
        columns = slice(group * size, (group + 1) * size)
        levels = quantized.codes[:, columns].double()
        if quantized.zero_point is not None:
            levels = levels - quantized.zero_point[:, group, None].double()
        found[:, columns] = levels * quantized.scale[:, group, None].double()
    return found


def in_range(quantized: QuantizedTensor) -> bool:
    """Whether every code and zero point fits its bits, and every scale is a number that one can divide by."""
    scheme: IntScheme = quantized.scheme
    stored = [quantized.codes] + ([] if quantized.zero_point is None else [quantized.zero_point])
    fits = all(scheme.qmin <= int(t.min()) and int(t.max()) <= scheme.qmax for t in stored)
    return fits and bool(torch.isfinite(quantized.scale).all()) and bool((quantized.scale != 0).all())
