"""A mixture of experts on a GPU: each expert multiplies the tokens that its router sends there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from compress.kernels import gpu_linear
from compress.kernels.triton.fused import Activation, gated
from compress.runtime.gpu_layer import FeedForward
from compress.runtime.gpu_linears import Linear
from compress.runtime.triton_linears import TritonLinear


@dataclass(frozen=True, slots=True)
class Grouped:
    """All experts as one weight: what runs does not depend on which were chosen, so that it can be recorded.

    same: as in `gpu_linear.multiply`.
    """

    gate_up: Any
    down: Any
    activation: Activation
    same: bool

    def __call__(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x (tokens, hidden), chosen (tokens, experts of each) -> (tokens, experts of each, hidden)."""
        tokens, each = chosen.shape
        way = gpu_linear.route(self.gate_up, chosen.flatten().to(torch.int32), x.dtype, self.same)
        gate, up = gpu_linear.multiply_experts(self.gate_up, x, way, each).chunk(2, -1)
        return gpu_linear.multiply_experts(self.down, gated(gate, up, self.activation), way, 1).view(tokens, each, -1)


def grouped(experts: Sequence[FeedForward], same: bool) -> Grouped | None:
    """Experts as one weight, whose memory they share from then on; None where no kernel takes them so."""
    found = []
    for linears in ([expert.gate_up for expert in experts], [expert.down for expert in experts]):
        packed = [linear for linear in linears if isinstance(linear, TritonLinear) and not linear.rounds_before]
        stacked = gpu_linear.stack([linear.packed for linear in packed]) if len(packed) == len(experts) else None
        if stacked is None:
            return None
        for linear, own in zip(packed, stacked[1], strict=True):
            linear.packed = own
        found.append(stacked[0])
    return Grouped(found[0], found[1], experts[0].activation, same)


@dataclass(frozen=True, slots=True)
class Experts:
    """chosen: experts of a token. renormalise: whether their shares are made to sum to 1."""

    router: Linear
    experts: Sequence[FeedForward]
    grouped: Grouped | None
    chosen: int
    renormalise: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        shares, numbers = self.router(x).float().softmax(-1).topk(self.chosen, -1)
        if self.renormalise:
            shares = shares / shares.sum(-1, keepdim=True)
        if self.grouped is not None:
            found = self.grouped(x, numbers).float() * shares.unsqueeze(-1)
            return (reduce(torch.add, found.unbind(1)) if self.grouped.same else found.sum(1)).to(x.dtype)
        return self._one_by_one(x, shares, numbers)

    def _one_by_one(self, x: Tensor, shares: Tensor, numbers: Tensor) -> Tensor:
        """Each expert on all of its tokens; the CPU has to know how many these are."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        order = numbers.flatten().argsort(stable=True)
        counts = numbers.flatten().bincount(minlength=len(self.experts)).tolist()
        for expert, places in zip(self.experts, order.split(counts), strict=True):
            if len(places):
                tokens = places // self.chosen
                out.index_add_(0, tokens, expert(x[tokens]).float() * shares.flatten()[places].unsqueeze(1))
        return out.to(x.dtype)
