"""Experts as one linear each, in place of the fused 3-D parameters that transformers holds in memory.

Hooks see every expert's inputs this way, and each expert has the checkpoint's own 2-D weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from compress.models.families import ExpertNames


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)), its three linears under the names the checkpoint gives them."""

    def __init__(self, names: ExpertNames, hidden: int, width: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.names = names
        self.act_fn = act_fn
        self.add_module(names.gate, nn.Linear(hidden, width, bias=False))
        self.add_module(names.up, nn.Linear(hidden, width, bias=False))
        self.add_module(names.down, nn.Linear(width, hidden, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        gate, up, down = (getattr(self, name) for name in (self.names.gate, self.names.up, self.names.down))
        return cast(torch.Tensor, down(self.act_fn(gate(x)) * up(x)))


class Experts(nn.ModuleList):
    """Stand-in for a fused experts module: same call, one Expert per number; an expert without tokens is not called.

    observe: called with an expert's number and what it adds to its tokens (tokens, hidden), router weight included, in
    the thread of the forward; None: nobody looks.
    """

    observe: Callable[[int, torch.Tensor], None] | None = None

    @classmethod
    def replacing(cls, fused: nn.Module, names: ExpertNames) -> Experts:
        """Experts with the shapes, activation, dtype and device of `fused` (gate_up_proj, down_proj), weights unset."""
        down = fused.get_parameter("down_proj")
        count, hidden, width = down.shape
        with torch.device(down.device):
            experts = cls(Expert(names, hidden, width, fused.get_submodule("act_fn")) for _ in range(count))
        return experts.to(down.dtype)

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden (tokens, width), the chosen experts and their weights (tokens, k) -> (tokens, width).

        Experts are summed in the order of their numbers, so the result does not depend on routing order.
        """
        result = torch.zeros_like(hidden)
        for number in torch.unique(top_k_index).tolist():
            token, slot = torch.where(top_k_index == number)
            output = self[number](hidden[token]) * top_k_weights[token, slot, None]
            if self.observe is not None:
                self.observe(number, output)
            result.index_add_(0, token, output.to(result.dtype))
        return result
