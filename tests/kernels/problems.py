"""Random quantisation problems for the kernel tests: correlated inputs, their Hessian, weights and a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.reference import nearest_code


@dataclass(frozen=True)
class Problem:
    """weight (out, in), hessian and upper (in, in), scale and zero_point (out, groups), group_of_column (in)."""

    weight: Tensor
    hessian: Tensor
    upper: Tensor
    scale: Tensor
    zero_point: Tensor
    group_of_column: Tensor
    qmin: int
    qmax: int

    @property
    def grid(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        return self.scale, self.zero_point, self.group_of_column, self.qmin, self.qmax

    def double(self) -> Problem:
        """The same problem in float64, for the oracle."""
        fields = (self.weight, self.hessian, self.upper, self.scale, self.zero_point)
        return Problem(*(t.double() for t in fields), self.group_of_column, self.qmin, self.qmax)

    def dequantised(self, codes: Tensor) -> Tensor:
        columns = self.group_of_column.long()
        return (codes.to(self.scale.dtype) - self.zero_point[:, columns]) * self.scale[:, columns]

    def nearest(self) -> Tensor:
        """Round to nearest, codes (out, in) int8."""
        columns = self.group_of_column.long()
        scale, zero_point = self.scale[:, columns], self.zero_point[:, columns]
        return nearest_code(self.weight, scale, zero_point, self.qmin, self.qmax)[0].to(torch.int8)

    def objective(self, codes: Tensor) -> Tensor:
        """(w - q) H (w - q)^T per row, in float64."""
        error = self.double().weight - self.double().dequantised(codes)
        return (error @ self.hessian.double() * error).sum(dim=1)


def make(
    out_features: int,
    in_features: int,
    groups: int,
    *,
    bits: int = 4,
    symmetric: bool = True,
    seed: int = 0,
    permuted: bool = False,
) -> Problem:
    """A problem whose inputs are correlated, so that error feedback has something to win."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mixing = torch.eye(in_features) + normal(in_features, in_features) / in_features**0.5
    x = normal(4 * in_features, in_features) @ mixing
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(in_features)
    weight = normal(out_features, in_features) * 0.02
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    grouped = weight.reshape(out_features, groups, -1)
    if symmetric:
        # 0.95: else the largest weight of a group would sit on a rounding boundary, where float32 may go either way.
        scale = 0.95 * grouped.abs().amax(dim=-1) / (qmax + 0.5)
        zero_point = torch.zeros_like(scale)
    else:
        low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
        scale = 0.95 * (high - low) / (qmax - qmin)
        zero_point = torch.clamp(torch.round(qmin - low / scale), qmin, qmax)
    group_of_column = torch.arange(in_features, dtype=torch.int32) // (in_features // groups)
    if permuted:
        order = torch.randperm(in_features, generator=generator)
        weight, group_of_column = weight[:, order].contiguous(), group_of_column[order].contiguous()
        hessian = hessian[order][:, order].contiguous()
    inverse = torch.linalg.inv(hessian.double())
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    return Problem(weight, hessian, upper, scale, zero_point, group_of_column, qmin, qmax)
