"""A draft that is a model of its own: it reads the same tokens and decodes a few of them, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.errors import IntegrityError, WorkError
from compress.runtime.drafting.sequence import Growing, opened
from compress.runtime.sampling import Sampler
from compress.runtime.text_model import TextModel


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens, and what each was drawn from (len(tokens), vocabulary) float64; None where the likeliest was taken."""

    tokens: tuple[int, ...]
    drawn_from: Tensor | None

    def probabilities(self, at: int) -> Tensor | None:
        """What the token at this place was drawn from."""
        return None if self.drawn_from is None else self.drawn_from[at]


class Drafting(Protocol):
    """A draft at work on one sequence."""

    def propose(self, ids: Sequence[int], count: int, sampler: Sampler) -> Proposal:
        """At most `count` tokens behind `ids`; none where the draft's own context ends."""


class Draft(Protocol):
    """What proposes tokens for a target."""

    name: str

    def begun(self, room: int) -> AbstractContextManager[Drafting]:
        """At work on a new sequence of at most `room` tokens."""


class DraftModel:
    """A loaded model as a draft."""

    def __init__(self, runtime: TextModel, target: TextModel) -> None:
        """Raises IntegrityError where the two read a text into other tokens."""
        if runtime.tokenizer_digest() != target.tokenizer_digest():
            raise IntegrityError(
                f"the draft {runtime.path} and {target.path} have different tokenizers",
                "a draft proposes token ids: give one that was made from the model, or from its family",
            )
        self.name = runtime.path.resolve().name
        self._runtime, self._vocabulary = runtime, target.vocab_size

    @contextmanager
    def begun(self, room: int) -> Iterator[Drafting]:
        """As `Draft` has it."""
        longest = room if self._runtime.context_length is None else min(room, self._runtime.context_length)
        with opened(self._runtime, longest) as sequence:
            yield _ModelAtWork(sequence, longest, self._vocabulary)


class _ModelAtWork:
    def __init__(self, sequence: Growing, longest: int, vocabulary: int) -> None:
        self._sequence, self._longest, self._vocabulary = sequence, longest, vocabulary

    def propose(self, ids: Sequence[int], count: int, sampler: Sampler) -> Proposal:
        """As `Drafting` has it."""
        count = min(count, self._longest - len(ids))
        if count <= 0:
            return Proposal((), None)
        held = self._sequence.ids
        same = next((i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), min(len(held), len(ids)))
        self._sequence.rewind(min(same, len(ids) - 1))
        pending = list(ids[len(self._sequence.ids) :])
        tokens: list[int] = []
        drawn: list[Tensor] = []
        while len(tokens) < count:
            logits = self._sequence.extend(pending)[-1]
            if not bool(torch.isfinite(logits).all()):
                raise WorkError("the draft's logits are not finite", "its weights are damaged: make it again")
            logits = fitted(logits, self._vocabulary)
            token, probabilities = sampler.draft(logits)
            tokens.append(token)
            drawn += [] if probabilities is None else [probabilities]
            pending = [token]
        return Proposal(tuple(tokens), torch.stack(drawn) if drawn else None)


def fitted(logits: Tensor, vocabulary: int) -> Tensor:
    """Logits (..., any) as of `vocabulary` ids: those beyond are padding, those that are missing impossible."""
    missing = vocabulary - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocabulary]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
