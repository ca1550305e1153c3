"""One answer while it grows: its tokens, when each came, whether it has ended and why, and its text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from compress.runtime.detokenizer import Detokenizer
from compress.runtime.protocol import FinishReason, Generation, SamplingParams
from compress.runtime.sampling import Sampler


class Reader(Protocol):
    """What an answer needs of a model: its text, its end tokens, its context."""

    end_ids: frozenset[int]
    context_length: int | None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""


class Answer:
    """The answer to `prompt`; `index` numbers the answers of a call. Made when its request arrives."""

    def __init__(self, reader: Reader, prompt: list[int], params: SamplingParams, index: int) -> None:
        self._reader = reader
        self.prompt = prompt
        self.params = params
        room = params.max_tokens if reader.context_length is None else reader.context_length - len(prompt)
        self.limit = min(params.max_tokens, room)
        """New tokens at most."""
        self.sampler = Sampler(params, index, prompt)
        self.fresh: list[int] = []
        self.reason: FinishReason | None = None
        self.cached_tokens = 0
        self._started = time.perf_counter()
        self._stamps: list[float] = []
        self._text = Detokenizer(reader.decode, prompt)
        self._tokens_read = 0

    def start(self) -> None:
        """The clock begins now instead of when the answer was made."""
        self._started = time.perf_counter()

    def take(self, token: int) -> None:
        """The next token has been chosen; sets `reason` where the answer ends with it."""
        self._stamps.append(time.perf_counter())
        if token in self._reader.end_ids and not self.params.ignore_end:
            self.reason = "stop"
            return
        self.fresh.append(token)
        if self.params.stop and self._end(self._read().steady) is not None:
            self.reason = "stop"
        elif len(self.fresh) == self.limit:
            self.reason = "length" if self.limit == self.params.max_tokens else "context"

    def text(self) -> str:
        """What has come so far, up to the first stop string in it."""
        found = self._read()
        text = found.text + found.rest
        return text[: self._end(text)]

    def settled(self) -> str:
        """The text so far without what may still change: an unfinished character, or what may become a stop string."""
        if self.reason is not None:
            return self.text()
        text, stops = self._read().steady, self.params.stop
        held = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
        return text[: len(text) - held]

    def generation(self) -> Generation:
        """The finished answer."""
        assert self.reason is not None
        stamps = self._stamps
        chosen = self.sampler.logprobs[: len(self.fresh)]
        return Generation(
            text=self.text(),
            token_ids=tuple(self.fresh),
            finish_reason=self.reason,
            prompt_tokens=len(self.prompt),
            prefill_seconds=stamps[0] - self._started,
            decode_seconds=stamps[-1] - stamps[0],
            step_seconds=tuple(after - before for before, after in pairwise(stamps)),
            cached_tokens=self.cached_tokens,
            logprobs=None if self.params.logprobs is None else tuple(chosen),
        )

    def _read(self) -> Detokenizer:
        """The text of all tokens so far; they are read where it is asked for."""
        if tokens := self.fresh[self._tokens_read :]:
            self._text.extend(tokens)
            self._tokens_read = len(self.fresh)
        return self._text

    def _end(self, text: str) -> int | None:
        """Where the first stop string in a text begins."""
        return min((at for stop in self.params.stop if (at := text.find(stop)) >= 0), default=None)
