"""The output projection, computed in slices of the vocabulary so that its weight is never cast as a whole.

Where a gradient is asked for, autograd keeps the weight, and it is cast at once.
"""

from __future__ import annotations

import torch
from torch import nn

from compress.models.checkpoint import Checkpoint

_SLICE_BYTES = 32 << 20


class StreamedHead(nn.Module):
    """logits = hidden @ weight.T with `weight` (vocabulary, width) mapped from the checkpoint, in hidden's dtype.

    replaced: the weight to take in its place.
    """

    def __init__(self, checkpoint: Checkpoint, weight: str) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._weight = weight
        self.replaced: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., width) -> logits (..., vocabulary)."""
        if self.replaced is not None:
            return nn.functional.linear(hidden, self.replaced.to(hidden.dtype))
        if torch.is_grad_enabled() and hidden.requires_grad:
            return nn.functional.linear(hidden, self._checkpoint.read(self._weight).to(hidden.dtype))
        vocabulary, width = self._checkpoint.index[self._weight].shape
        logits = hidden.new_empty(*hidden.shape[:-1], vocabulary)
        step = max(1, _SLICE_BYTES // (width * hidden.element_size()))
        for start in range(0, vocabulary, step):
            rows = self._checkpoint.read_rows(self._weight, slice(start, start + step)).to(hidden)
            torch.matmul(hidden, rows.T, out=logits[..., start : start + step])
        return logits
