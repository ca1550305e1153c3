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


class Entry(nn.Module):
    """Passed before the first expert: where a staged forward learns which tokens the router sends where.

    everywhere: experts that are called with all tokens; of their outputs only those of their own tokens are used.
    """

    everywhere: frozenset[int] = frozenset()

    def forward(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """top_k_index (tokens, k), as it is."""
        return top_k_index


class Experts(nn.ModuleList):
    """Stand-in for a fused experts module: same call, one Expert per number; an expert without tokens is not called,
    unless `entry` has it called with all.

    observe: called with an expert's number and what it adds to its tokens (tokens, hidden), router weight included, in
    the thread of the forward; None: nobody looks.
    """

    observe: Callable[[int, torch.Tensor], None] | None = None
    _entries: tuple[Entry, ...] = ()  # in a tuple: it is no expert, and holds no weights

    @property
    def entry(self) -> Entry:
        """What is passed before the first expert."""
        if not self._entries:
            self._entries = (Entry(),)
        return self._entries[0]

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
        self.entry(top_k_index)
        everywhere = self.entry.everywhere
        for number in sorted({*torch.unique(top_k_index).tolist(), *everywhere}):
            token, slot = torch.where(top_k_index == number)
            found = self[number](hidden)[token] if number in everywhere else self[number](hidden[token])
            output = found * top_k_weights[token, slot, None]
            if self.observe is not None:
                self.observe(number, output)
            result.index_add_(0, token, output.to(result.dtype))
        return result


def keep_rows(router: nn.Module, kept: torch.Tensor, experts: int) -> None:
    """Leaves a router with the rows of some of its experts: kept (n,) int64, of parameters and buffers alike."""
    for name, rows in [*router.named_parameters(recurse=False), *router.named_buffers(recurse=False)]:
        if rows.shape[0] == experts:
            left, is_parameter = rows.detach()[kept].contiguous(), name in router._parameters
            setattr(router, name, nn.Parameter(left, requires_grad=False) if is_parameter else left)
    router.num_experts = len(kept)  # type: ignore[assignment]
