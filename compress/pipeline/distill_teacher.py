"""What the teacher says of each chunk. Its last hidden states are kept, so that later epochs cost one product.

The states are those that enter the head, in the compute dtype, and a chunk is always the same windows: what is replayed
is bit for bit what would be computed, so a resumed run sees the same teacher.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

MOST_KEPT = 1 << 30
"""Bytes of hidden states that are kept at most; beyond that the teacher is run again."""


class Teacher:
    """Logits (windows, seq_len, vocabulary) of a frozen model for numbered chunks of token ids."""

    def __init__(self, model: Any, tokens: int) -> None:
        self._model = model.eval().requires_grad_(False)
        self._head = model.get_output_embeddings()
        self._entering = threading.local()
        self._kept: dict[str, Tensor] = {}
        weight = self._head.weight
        self._keeps: bool | None = None if tokens * weight.shape[1] * weight.element_size() <= MOST_KEPT else False
        self._head.register_forward_pre_hook(lambda _, given: setattr(self._entering, "hidden", given[0]))

    @property
    def vocabulary(self) -> int:
        """How many ids it gives a logit."""
        return int(self._head.weight.shape[0])

    @torch.no_grad()
    def logits(self, key: str, ids: Tensor) -> Tensor:
        """Of the chunk called `key`, which always has the same `ids` (windows, seq_len)."""
        hidden = self._kept.get(key)
        if hidden is not None:
            return self._head(hidden)
        logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        hidden = self._entering.hidden
        if self._keeps is None:  # a model that does more behind its head (soft caps, scales) cannot be replayed
            self._keeps = torch.equal(self._head(hidden), logits)
        if self._keeps:
            self._kept[key] = hidden
        return logits
