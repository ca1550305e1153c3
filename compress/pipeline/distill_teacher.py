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

    def __init__(self, model: Any, tokens: int, states: int = 0) -> None:
        """tokens: of all chunks. states: how many hidden states of each will be asked for besides."""
        self._model = model.eval().requires_grad_(False)
        self._head = model.get_output_embeddings()
        self._entering = threading.local()
        self._kept: dict[str, Tensor] = {}
        weight = self._head.weight
        self._states: dict[str, list[Tensor]] = {}
        room = tokens * weight.shape[1] * weight.element_size() * (1 + states)
        self._keeps: bool | None = None if room <= MOST_KEPT else False
        self._head.register_forward_pre_hook(lambda _, given: setattr(self._entering, "hidden", given[0]))

    @property
    def blocks(self) -> int:
        """How many decoder blocks it has."""
        return int(self._model.config.num_hidden_layers)

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
        return self._run(key, ids).logits

    @torch.no_grad()
    def said(self, key: str, ids: Tensor, places: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The logits, and the hidden states (windows, seq_len, width) at these places of the model's list of them."""
        if not places:
            return self.logits(key, ids), []
        if key in self._states:
            return self._head(self._kept[key]), self._states[key]
        output = self._run(key, ids, output_hidden_states=True)
        states = [output.hidden_states[place] for place in places]
        if self._keeps:
            self._states[key] = states
        return output.logits, states

    def _run(self, key: str, ids: Tensor, **more: bool) -> Any:
        output = self._model(input_ids=ids, use_cache=False, **more)
        hidden = self._entering.hidden
        if self._keeps is None:  # a model that does more behind its head (soft caps, scales) cannot be replayed
            self._keeps = torch.equal(self._head(hidden), output.logits)
        if self._keeps:
            self._kept[key] = hidden
        return output
