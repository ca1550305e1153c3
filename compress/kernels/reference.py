"""The exact and slow definition of every operation in `kernels`: what the fast versions are tested against.

Plain loops in the dtype of the arguments (use float64 for an oracle). Shapes follow the legend in `types.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.kernels.scales import stored_scale


def nearest_code(value: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """(codes, dequantised): clamp(round half to even(value / scale) + zero_point, qmin, qmax), all of one shape."""
    codes = torch.clamp(torch.round(value / scale) + zero_point, qmin, qmax)
    return codes, (codes - zero_point) * scale


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
    """GPTQ (arXiv 2210.17323, algorithm 1) one column at a time.

    weight (out, in); upper (in, in), the upper Cholesky factor U of the inverse Hessian (H^-1 = U^T U);
    scale, zero_point (out, groups); group_of_column (in) integers; pruned (out, in), not 0 where a weight becomes zero
    whatever it is. Returns codes (out, in) int8 and the loss per row (out), sum of e^2 / 2 with e = (w - dequantised)
    / U_ii.
    """
    weight = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    loss = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    for i, group in enumerate(group_of_column.tolist()):
        value = weight[:, i] if pruned is None else weight[:, i].masked_fill(pruned[:, i] != 0, 0)
        column, dequantised = nearest_code(value, scale[:, group], zero_point[:, group], qmin, qmax)
        codes[:, i] = column.to(torch.int8)
        error = (weight[:, i] - dequantised) / upper[i, i]
        weight[:, i + 1 :] -= error.unsqueeze(1) * upper[i, i + 1 :]
        loss += error.square() / 2
    return codes, loss


def prune_columns(weight: Tensor, upper: Tensor, pruned: Tensor, group: int, drop: int) -> Tensor:
    """SparseGPT (arXiv 2301.00774, algorithm 1) one column at a time, within one block of columns.

    weight (out, in), updated: zero where pruned, the rest corrected; upper (in, in), the block's part of the Cholesky
    factor U of the inverse Hessian (H^-1 = U^T U); pruned (out, in) int8, 1 where a weight is to go. With a `group`
    (else 0) `pruned` is written: of every `group` columns the `drop` with the least w^2 / U_ii^2 go. Returns the
    errors (out, in): columns after the block are to be corrected by -errors @ (their part of U).
    """
    errors = torch.zeros_like(weight)
    for i in range(weight.shape[1]):
        if group and i % group == 0:
            part = slice(i, i + group)
            scores = (weight[:, part] / upper.diagonal()[part]).square()
            pruned[:, part] = 0
            pruned[:, part].scatter_(1, scores.argsort(dim=1, stable=True)[:, :drop], 1)
        errors[:, i] = torch.where(pruned[:, i] != 0, weight[:, i] / upper[i, i], 0)
        weight[:, i] = torch.where(pruned[:, i] != 0, 0, weight[:, i])
        weight[:, i + 1 :] -= errors[:, i : i + 1] * upper[i, i + 1 :]
    return errors


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
    """Lower (w - q) H (w - q)^T of every row by giving one code at a time its best value.

    gradient (out, in) holds (w - q) H and is updated, codes (out, in) int8 too; hessian (in, in) symmetric. Columns
    whose diagonal is not positive stay. What is pruned (out, in; not 0) goes to zero. Returns how many codes changed,
    counting every change.
    """
    changed = 0
    for _ in range(sweeps):
        before = changed
        for j, group in enumerate(group_of_column.tolist()):
            if hessian[j, j] <= 0:
                continue
            old = (codes[:, j].to(gradient.dtype) - zero_point[:, group]) * scale[:, group]
            target = old + gradient[:, j] / hessian[j, j]
            target = target if pruned is None else target.masked_fill(pruned[:, j] != 0, 0)
            column, new = nearest_code(target, scale[:, group], zero_point[:, group], qmin, qmax)
            changed += int((column != codes[:, j]).sum())
            codes[:, j] = column.to(torch.int8)
            gradient -= (new - old).unsqueeze(1) * hessian[j]
        if changed == before:
            break
    return changed


def rounding_loss(
    weight: Tensor,
    scales: Tensor,
    importance: Tensor,
    shares: Sequence[float],
    group_size: int,
    bits: int,
    symmetric: bool,
) -> Tensor:
    """What rounding to nearest costs under candidate column scales: (candidates).

    weight (out, in); scales (candidates, in), what the columns are multiplied with; importance (candidates, in), what
    a squared error of a scaled column counts. Every group of `group_size` columns of a row takes the best of the grids
    that cover `shares` of its range: share * amax / ((2^bits - 1) / 2) when symmetric, else share * (max - min) /
    (2^bits - 1) with zero inside the range.
    """
    losses = []
    levels = 2**bits - 1
    for scale, counts in zip(scales, importance, strict=True):
        groups = (weight * scale).reshape(weight.shape[0], -1, group_size)
        costs = []
        for share in shares:
            if symmetric:
                step = (share * groups.abs().amax(-1, keepdim=True) / (levels / 2)).clamp(min=1e-8)
                rounded = torch.round(groups / step).clamp(-(levels + 1) / 2, (levels - 1) / 2)
            else:
                low = share * groups.amin(-1, keepdim=True).clamp(max=0)
                high = share * groups.amax(-1, keepdim=True).clamp(min=0)
                step = ((high - low) / levels).clamp(min=1e-8)
                zero = torch.round(-low / step).clamp(0, levels)
                rounded = (torch.round(groups / step) + zero).clamp(0, levels) - zero
            costs.append(((rounded * step - groups).square() * counts.reshape(-1, group_size)).sum(-1))
        losses.append(torch.stack(costs).amin(0).sum())
    return torch.stack(losses)


def range_loss(
    weight: Tensor,
    importance: Tensor | None,
    share: Tensor,
    sign: Tensor,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> Tensor:
    """What rounding to nearest costs on a grid over `share` of each group's range: (out, groups).

    weight (out, in); importance (groups, size, size), or None for squared errors; share (out, groups); sign (out,
    groups), of a symmetric grid's scale. Scales are rounded to `scale_dtype`.
    """
    groups = weight.reshape(*share.shape, -1)
    levels = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0) * share, groups.amax(-1).clamp(min=0) * share
    if symmetric:
        zero = torch.full_like(share, (levels + 1) / 2)
        scale = stored_scale(torch.maximum(-low, high) / (levels / 2) * sign, scale_dtype, (levels + 1) // 2)
    else:
        scale = stored_scale((high - low) / levels, scale_dtype, (levels + 1) // 2).to(weight.dtype)
        zero = torch.round(-low / scale).clamp(0, levels)
        scale = stored_scale(scale, scale_dtype, torch.maximum(zero, levels - zero))
    step, zero = scale.to(weight.dtype).unsqueeze(-1), zero.unsqueeze(-1)
    error = ((torch.round(groups / step) + zero).clamp(0, levels) - zero) * step - groups
    if importance is None:
        return error.square().sum(-1)
    return torch.einsum("ogi,gij,ogj->og", error, importance, error)


def search_range(
    weight: Tensor,
    importance: Tensor | None,
    shares: Sequence[float],
    offsets: Sequence[float],
    group_size: int,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The share and the sign with the least `range_loss` for each group, both (out, groups).

    Each of `shares` with both signs (asymmetric grids have but one), then each of `offsets` from the best of those;
    the first of equals stays.
    """
    share, sign = weight.new_ones(2, weight.shape[0], weight.shape[1] // group_size).unbind(0)
    least = torch.full_like(share, torch.inf)

    def consider(other: Tensor, turned: Tensor) -> None:
        nonlocal share, sign, least
        loss = range_loss(weight, importance, other, turned, bits, symmetric, scale_dtype)
        better = loss < least
        share, sign = torch.where(better, other, share), torch.where(better, turned, sign)
        least = torch.where(better, loss, least)

    for turn in (1.0, -1.0) if symmetric else (1.0,):
        for candidate in shares:
            consider(torch.full_like(share, candidate), torch.full_like(share, turn))
    centre, turned = share, sign
    for offset in offsets:
        consider(centre + offset, turned)
    return share, sign


def add_moment(total: Tensor, left: Tensor, right: Tensor, rows: range, upper: bool) -> None:
    """total[rows] += (left^T right)[rows]; with `upper` only columns from the first row on. total (in, in) float32.

    With `upper`, what lies below the diagonal is nothing to rely on.
    """
    chosen = slice(rows.start, rows.stop)
    columns = slice(rows.start if upper else 0, None)
    total[chosen, columns] += left[:, chosen].float().T @ right[:, columns].float()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v over the tokens up to each query, in float32 or wider: (batch, tokens, heads, dim)."""
    group, tokens = query.shape[1] // key.shape[1], query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(wide), key.to(wide).repeat_interleave(group, 1), value.to(wide).repeat_interleave(group, 1)
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    scores = (scale * (q @ k.transpose(-1, -2))).masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous().to(query.dtype)
