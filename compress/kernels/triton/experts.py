"""Products of tokens with the packed weights of the experts that each was sent to.

Few tokens share few experts, so each reads its own: `gemv` with a program for every pair. Of more, those with one
expert are put together into blocks for tensor cores. Where they begin is found on the device, and there are as many
blocks as there could be at most, so that no choice of experts changes what is launched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from compress.kernels.triton.configs import SAME_TOKENS, config
from compress.kernels.triton.gemm import gemm_kernel
from compress.kernels.triton.gemv import MAGIC, gemv_kernel
from compress.kernels.triton.linear import DTYPES, constants
from compress.kernels.triton.packing import PackedWeight
from compress.kernels.triton.splits import Sums

MOST_ALONE = 16
"""Pairs of a token and an expert, up to which each reads its expert; or as many as there are experts, if more."""


@dataclass(frozen=True, eq=False, slots=True)
class Route:
    """Which expert each pair of a token and one of its experts goes to: chosen (pairs,) int32.

    order (pairs,) int32: pairs by expert. blocks (n, 3) int32: an expert, where its pairs begin in `order`, and how
    many there are; none in blocks that are not needed. size: pairs of a block at most. None where each reads its own.
    tokens: what products are cut for.
    """

    chosen: Tensor
    order: Tensor | None = None
    blocks: Tensor | None = None
    size: int = 1
    tokens: int = 1


def route(chosen: Tensor, experts: PackedWeight, dtype: torch.dtype, same: bool = False) -> Route:
    """The way of pairs to experts, for weights of `packing.stack` and inputs of a dtype; same: as `linear.multiply`."""
    pairs, count = chosen.shape[0], experts.words.shape[0]
    if pairs <= max(MOST_ALONE, count) and not same:
        return Route(chosen)
    tokens = SAME_TOKENS if same else -(-pairs // count)
    size = config("gemm", chosen.device, experts.bits, tokens, 1, 1, 8 * dtype.itemsize).block_tokens
    numbers = torch.arange(count, dtype=torch.int32, device=chosen.device)
    held = (chosen.unsqueeze(1) == numbers).sum(0)
    ends = ((held + size - 1) // size).cumsum(0)
    block = torch.arange(min(count, pairs) + pairs // size, device=chosen.device)
    expert = torch.searchsorted(ends, block, right=True).clamp_(max=count - 1)
    before = torch.where(expert == 0, 0, ends[expert - 1])
    skipped = size * (block - before)
    left = (held[expert] - skipped).clamp_(0, size)
    first = (held.cumsum(0) - held)[expert] + skipped
    blocks = torch.stack([expert, first, left], 1).to(torch.int32)
    return Route(chosen, chosen.argsort(stable=True).to(torch.int32), blocks, size, tokens)


def multiply_experts(experts: PackedWeight, x: Tensor, way: Route, every: int) -> Tensor:
    """Each x times the weight of its expert, transposed, plus its bias: (pairs, out) in the dtype of x.

    experts: of `packing.stack`. Pair i takes row i // every of x, contiguous. Weights have the value (code - zero) *
    scale in float32 where each pair reads its own, as one token's in `linear.multiply`; else that rounded to x's dtype.
    ValueError where x does not fit.
    """
    pairs = way.chosen.shape[0]
    if x.shape != (pairs // every, experts.columns) or x.dtype not in DTYPES or not x.is_contiguous():
        raise ValueError(f"inputs {x.dtype} {tuple(x.shape)} do not fit {pairs} pairs, {every} of each row")
    return _alone(experts, x, way.chosen, every) if way.blocks is None else _in_blocks(experts, x, way, every)


def _alone(experts: PackedWeight, x: Tensor, chosen: Tensor, every: int) -> Tensor:
    pairs, chunks = chosen.shape[0], experts.words.shape[1]
    cut = config("gemv", x.device, experts.bits, 1, experts.rows, chunks, 8 * x.itemsize)
    cut = replace(cut, splits=max(1, cut.splits // pairs))
    whole = cut.splits == 1  # else each row's own bias comes at the end, where experts are not known
    sums = Sums(x, pairs, experts.rows, cut.splits, experts.bias if whole else None)
    gemv_kernel[(triton.cdiv(experts.rows, cut.block_rows), cut.splits, pairs)](
        x, experts.words, experts.high, experts.scale, experts.zero, experts.divisor, sums.bias, sums.target, chosen,
        experts.rows, experts.columns, chunks, cut.splits, experts.scale.shape[1], every, MAGIC,
        **constants(experts, cut),
    )  # fmt: skip
    out = sums.finished()
    if experts.bias is not None and not whole:
        out += experts.bias[chosen]
    return out


def _in_blocks(experts: PackedWeight, x: Tensor, way: Route, every: int) -> Tensor:
    assert way.blocks is not None
    pairs, chunks = way.chosen.shape[0], experts.words.shape[1]
    cut = config("gemm", x.device, experts.bits, way.tokens, experts.rows, chunks, 8 * x.itemsize)
    out = torch.empty(pairs, experts.rows, dtype=x.dtype, device=x.device)
    gemm_kernel[(way.blocks.shape[0], triton.cdiv(experts.rows, cut.block_rows), 1)](
        x, experts.words, experts.high, experts.scale, experts.zero, experts.divisor, experts.bias, out, way.blocks,
        way.order, pairs, experts.rows, experts.columns, chunks, 1, experts.scale.shape[1], every,
        **constants(experts, cut), BLOCK_TOKENS=way.size,
    )  # fmt: skip
    return out
