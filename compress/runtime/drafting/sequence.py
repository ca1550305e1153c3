"""One sequence of a loaded model that grows by several tokens at a time and can be taken back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.runtime.paged_backend import PagedRuntime
from compress.runtime.paged_sequence import PagedSequence
from compress.runtime.text_model import TextModel
from compress.runtime.transformers_backend import TransformersRuntime


class Growing(Protocol):
    """Tokens with their keys and values."""

    ids: list[int]

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Logits (len(tokens), vocabulary) float32 behind each of the tokens, which are added."""

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""


class DenseSequence:
    """Over the keys and values that transformers keeps; where those cannot be cut off, they are computed again."""

    def __init__(self, runtime: TransformersRuntime) -> None:
        self.ids: list[int] = []
        self._model, self._device = runtime.model, runtime.device
        self._cache: Any = None
        self._kept = 0

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int]) -> Tensor:
        self.ids += tokens
        pending = torch.tensor([self.ids[self._kept :]], device=self._device)
        step = self._model(input_ids=pending, past_key_values=self._cache, use_cache=True)
        self._cache, self._kept = step.past_key_values, len(self.ids)
        logits: Tensor = step.logits[0, -len(tokens) :].float()
        return logits

    def rewind(self, length: int) -> None:
        del self.ids[length:]
        if self._kept <= length:
            return
        try:  # caches have no crop, do not offer it, or refuse it, each kind by another of these errors
            self._cache.crop(length - self._kept)
            self._kept = length
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            self._cache, self._kept = None, 0  # windows that slide have let go of what was before


@contextmanager
def opened(runtime: TextModel, room: int) -> Iterator[Growing]:
    """An empty sequence of a model, of at most `room` tokens."""
    if isinstance(runtime, PagedRuntime):
        with runtime.model.pages.lend(room) as pages:
            yield PagedSequence(runtime.model, pages, room)
    else:
        assert isinstance(runtime, TransformersRuntime)
        yield DenseSequence(runtime)
