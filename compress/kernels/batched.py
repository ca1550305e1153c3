"""The column loops in batched torch, for devices that the native kernels do not reach (CUDA).

All rows at once; columns in chunks, so that most of the arithmetic is one matrix product per chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.reference import nearest_code

COLUMN_CHUNK = 128


def gptq_quantize(
    weight: Tensor,
    upper: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_of_column: Tensor,
    qmin: int,
    qmax: int,
    pruned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.gptq_quantize`."""
    weight = weight.clone()
    out_features, in_features = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    loss = torch.zeros(out_features, dtype=weight.dtype, device=weight.device)
    scale, zero_point = scale[:, group_of_column], zero_point[:, group_of_column]
    for begin in range(0, in_features, COLUMN_CHUNK):
        end = min(begin + COLUMN_CHUNK, in_features)
        chunk = weight[:, begin:end]
        corner = upper[begin:end, begin:end]
        errors = torch.empty_like(chunk)
        for i in range(end - begin):
            j = begin + i
            value = chunk[:, i] if pruned is None else chunk[:, i].masked_fill(pruned[:, j] != 0, 0)
            column, dequantised = nearest_code(value, scale[:, j], zero_point[:, j], qmin, qmax)
            codes[:, j] = column.to(torch.int8)
            errors[:, i] = (chunk[:, i] - dequantised) / corner[i, i]
            chunk[:, i + 1 :] -= errors[:, i : i + 1] * corner[i, i + 1 :]
        loss += errors.square().sum(dim=1) / 2
        weight[:, end:] -= errors @ upper[begin:end, end:]
    return codes, loss


def coordinate_descent(
    gradient: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_of_column: Tensor,
    qmin: int,
    qmax: int,
    codes: Tensor,
    sweeps: int,
    pruned: Tensor | None = None,
) -> int:
    """As `reference.coordinate_descent`; the count is read back from the device once per sweep."""
    in_features = gradient.shape[1]
    scale, zero_point = scale[:, group_of_column], zero_point[:, group_of_column]
    diagonal = hessian.diagonal()
    movable = (diagonal > 0).tolist()
    total = 0
    for _ in range(sweeps):
        before = codes.clone()
        moves = torch.zeros((), dtype=torch.int64, device=codes.device)
        for begin in range(0, in_features, COLUMN_CHUNK):
            end = min(begin + COLUMN_CHUNK, in_features)
            chunk = gradient[:, begin:end].clone()
            steps = torch.zeros_like(chunk)
            for i in range(end - begin):
                j = begin + i
                if not movable[j]:
                    continue
                old = (codes[:, j].to(gradient.dtype) - zero_point[:, j]) * scale[:, j]
                target = old + chunk[:, i] / diagonal[j]
                target = target if pruned is None else target.masked_fill(pruned[:, j] != 0, 0)
                column, new = nearest_code(target, scale[:, j], zero_point[:, j], qmin, qmax)
                moves += (column != codes[:, j]).sum()
                codes[:, j] = column.to(torch.int8)
                steps[:, i] = new - old
                chunk -= steps[:, i : i + 1] * hessian[j, begin:end]
            gradient -= steps @ hessian[begin:end]
        total += int(moves)
        if torch.equal(codes, before):
            break
    return total
