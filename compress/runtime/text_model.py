"""What every back end does the same way: text and tokens, choosing token after token, and refusing bad requests."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.runtime.continuations import Continuation
from compress.runtime.memory import guarded
from compress.runtime.protocol import FinishReason, Generation, SamplingParams
from compress.runtime.sampling import next_token, seeded
from compress.runtime.transformers_loader import end_tokens, load_tokenizer

_TAIL_TOKENS = 8  # before a stop string, so that how decoding begins does not touch it

Predict = Callable[[Sequence[int]], Tensor]
"""Takes the tokens that follow those seen so far, gives the logits (vocab,) of what comes next."""


class TextModel(ABC):
    """A model with its tokenizer; a back end adds how logits come about."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.path: Path = checkpoint.path
        self.tokenizer: Any = load_tokenizer(checkpoint)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.prefix_id: int | None = eos if bos is None else bos
        self.end_ids = end_tokens(checkpoint, self.tokenizer)
        self.context_length: int | None = None
        self.vocab_size = 0

    @abstractmethod
    def _session(self, tokens: int) -> AbstractContextManager[Predict]:
        """One sequence of at most so many tokens, from its beginning on."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text with the special tokens that the tokenizer itself adds to one."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def tokenizer_digest(self) -> str:
        """SHA-256 of the vocabulary and the begin and end tokens.

        Taken over what the tokenizer does, not over its files, because tools that copy a model rewrite those files.
        """
        ends = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        identity = [sorted(self.tokenizer.get_vocab().items()), *ends]
        return hashlib.sha256(json.dumps(identity, ensure_ascii=False).encode()).hexdigest()

    def generate(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> list[Generation]:
        """One answer per prompt, each computed alone, so that it does not depend on its neighbours."""
        with guarded("generating"):
            return [self._generate(prompt, params, index) for index, prompt in enumerate(prompts)]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[str]:
        """The answer of `generate` piece by piece; together the pieces are its text.

        What may still change is held back: bytes of an unfinished character, and what may become a stop string.
        """
        ids = self._prompt_ids(prompt)
        fresh: list[int] = []
        shown = ""
        with guarded("generating"), closing(self._fresh_tokens(ids, params, 0)) as tokens:
            for token, _ in tokens:
                if token in self.end_ids and not params.ignore_end:
                    break
                fresh.append(token)
                text = self._continuation(ids, fresh)
                stopped = any(stop in text for stop in params.stop)
                ready = _before(text, params.stop) if stopped else _settled(text, params.stop)
                if len(ready) > len(shown):
                    yield ready[len(shown) :]
                    shown = ready
                if stopped:
                    return
        rest = _before(self._continuation(ids, fresh), params.stop)
        if len(rest) > len(shown):
            yield rest[len(shown) :]

    def _generate(self, prompt: str | Sequence[int], params: SamplingParams, index: int) -> Generation:
        ids = self._prompt_ids(prompt)
        fresh: list[int] = []
        reason: FinishReason = "length" if self._limit(ids, params) == params.max_tokens else "context"
        stamps: list[float] = []
        start = time.perf_counter()
        with closing(self._fresh_tokens(ids, params, index)) as tokens:
            for token, stamp in tokens:
                stamps.append(stamp)
                if token in self.end_ids and not params.ignore_end:
                    reason = "stop"
                    break
                fresh.append(token)
                if self._stopped(ids, fresh, params.stop):
                    reason = "stop"
                    break
        steps = tuple(after - before for before, after in pairwise(stamps))
        return Generation(
            text=_before(self._continuation(ids, fresh), params.stop),
            token_ids=tuple(fresh),
            finish_reason=reason,
            prompt_tokens=len(ids),
            prefill_seconds=stamps[0] - start,
            decode_seconds=stamps[-1] - stamps[0],
            step_seconds=steps,
        )

    def _fresh_tokens(
        self, ids: list[int], params: SamplingParams, index: int
    ) -> Generator[tuple[int, float], None, None]:
        """Token after token as far as there is room, and when each was known."""
        generator = seeded(params, index)
        limit = self._limit(ids, params)
        pending: Sequence[int] = ids
        with self._session(len(ids) + limit) as predict:
            for _ in range(limit):
                with torch.inference_mode():
                    token = next_token(predict(pending), params, generator)
                yield token, time.perf_counter()
                pending = [token]

    def _limit(self, ids: list[int], params: SamplingParams) -> int:
        room = params.max_tokens if self.context_length is None else self.context_length - len(ids)
        return min(params.max_tokens, room)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = ([] if self.prefix_id is None else [self.prefix_id]) + self.encode(prompt)
        else:
            ids = list(prompt)
            self._check(torch.tensor([ids], dtype=torch.int64))
        if not ids:
            raise UserError("the prompt is empty and the tokenizer has no begin token", "give a prompt")
        if self.context_length is not None and len(ids) >= self.context_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens and the model's context {self.context_length}", "shorten the prompt"
            )
        return ids

    def _check_continuations(self, requests: Sequence[Continuation]) -> None:
        for request in requests:
            if not 1 <= request.start < len(request.token_ids):
                raise UserError(
                    f"nothing to score: {len(request.token_ids)} tokens, from {request.start} on",
                    "give at least one token before `start` and one after it",
                )
        inputs = max((len(request.token_ids) - 1 for request in requests), default=1)
        ids = [token for request in requests for token in request.token_ids]
        self._check_range(inputs, min(ids, default=0), max(ids, default=0))

    def _continuation(self, prompt: list[int], fresh: list[int]) -> str:
        """The text that `fresh` adds: decoded together, because many tokenizers drop a leading space decoded alone."""
        before, whole = self.decode(prompt), self.decode(prompt + fresh)
        return whole[len(before) :] if whole.startswith(before) else self.decode(fresh)

    def _stopped(self, prompt: list[int], fresh: list[int], stops: Sequence[str]) -> bool:
        """Whether the answer holds a stop string; decodes all of it only where its last tokens seem to."""
        if not stops:
            return False
        tail = self.decode(fresh[-(max(len(stop.encode()) for stop in stops) + _TAIL_TOKENS) :])
        return any(stop in tail and stop in self._continuation(prompt, fresh) for stop in stops)

    def _check(self, token_ids: Tensor) -> None:
        if token_ids.ndim != 2 or token_ids.numel() == 0:
            raise UserError(f"token ids have shape {tuple(token_ids.shape)}", "give a non-empty (batch, seq) tensor")
        self._check_range(token_ids.shape[1], int(token_ids.min()), int(token_ids.max()))

    def _check_range(self, length: int, low: int, high: int) -> None:
        if self.context_length is not None and length > self.context_length:
            raise UserError(
                f"a sequence of {length} tokens exceeds the model's context of {self.context_length}",
                "use shorter windows (--seq-len)",
            )
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}",
                "use the tokenizer that belongs to the model",
            )


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text


def _settled(text: str, stops: Sequence[str]) -> str:
    """The text without an unfinished character and without what a stop string may begin with, at its end."""
    text = text.rstrip("\ufffd")
    held = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[: len(text) - held]
