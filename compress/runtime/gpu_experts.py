"""A mixture of experts on a GPU: each expert multiplies the tokens that its router sends there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.runtime.gpu_linears import Linear


@dataclass(frozen=True, slots=True)
class Experts:
    """chosen: experts of a token. renormalise: whether their shares are made to sum to 1."""

    router: Linear
    experts: Sequence[Callable[[Tensor], Tensor]]
    chosen: int
    renormalise: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden). Which experts run is known on the CPU only: this is not recorded."""
        shares, numbers = self.router(x).float().softmax(-1).topk(self.chosen, -1)
        if self.renormalise:
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        order = numbers.flatten().argsort(stable=True)
        counts = numbers.flatten().bincount(minlength=len(self.experts)).tolist()
        for expert, places in zip(self.experts, order.split(counts), strict=True):
            if len(places):
                tokens = places // self.chosen
                out.index_add_(0, tokens, expert(x[tokens]).float() * shares.flatten()[places].unsqueeze(1))
        return out.to(x.dtype)
