"""The step that both attention kernels share: a page of keys and values into a running softmax (arXiv 2205.14135)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compress.kernels.triton.decode import dot, rounded_to


@triton.jit
def capped(scores, SOFTCAP: tl.constexpr):
    """softcap * tanh(scores / softcap); 0 leaves scores as they are."""
    if SOFTCAP > 0:
        return SOFTCAP * (1.0 - 2.0 / (tl.exp(scores * (2.0 / SOFTCAP)) + 1.0))
    else:
        return scores


@triton.jit
def add_page(q, k, v, factor, seen, most, weight, total, SOFTCAP: tl.constexpr):
    """(most, weight, total) of each query with a page more: the largest score, the sum of shares, that of values.

    q (queries, lanes); k, v (places, lanes); factor (places,) float32: of scores; seen (queries or 1, places). Scores
    are powers of two. Nothing is divided yet.
    """
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * factor[None, :]
    scores = tl.where(seen, capped(scores, SOFTCAP) * 1.4426950408889634, -1.0e30)
    now = tl.maximum(most, tl.max(scores, axis=1))
    share = tl.where(seen, tl.exp2(scores - now[:, None]), 0.0)
    shrink = tl.exp2(most - now)
    total = dot(rounded_to(share, q.dtype), v, total * shrink[:, None])
    return now, weight * shrink + tl.sum(share, axis=1), total


def launch_of(dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Warps and stages of either kernel: pages of wide float32, which tensor cores do not take, need more registers."""
    wide = dtype == torch.float32 and dim > 64
    return {"num_warps": 8 if wide else 4, "num_stages": 1 if wide else 2}
