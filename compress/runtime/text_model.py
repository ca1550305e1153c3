"""What every back end does the same way: text and tokens, choosing token after token, and refusing bad requests."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.runtime.answer import Answer
from compress.runtime.continuations import Continuation
from compress.runtime.memory import guarded
from compress.runtime.prompts import Prompt, checked_text, token_ids
from compress.runtime.protocol import Generation, SamplingParams
from compress.runtime.transformers_loader import end_tokens, load_tokenizer


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

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        return list(self.tokenizer(checked_text(text), add_special_tokens=False, verbose=False)["input_ids"])

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text with the special tokens that the tokenizer itself adds to one."""
        return list(self.tokenizer(checked_text(text), verbose=False)["input_ids"])

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

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Generation]:
        """`params.n` answers per prompt, in order; none depends on its neighbours. params: of all, or one each.

        Raises:
            UserError: a prompt that is empty or too long, or not as many params as prompts.
        """
        with guarded("generating"):
            return [answer.generation() for answer in self._finished(self.answers(prompts, params))]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The (first) answer of `generate` piece by piece; together the pieces are its text.

        What may still change is held back: bytes of an unfinished character, and what may become a stop string.
        """
        answer = self.answers([prompt], params)[0]
        shown = 0
        with guarded("generating"), closing(self._grow(answer)) as growing:
            while True:
                ended = next(growing, "ended") == "ended"
                ready = answer.settled()
                if len(ready) > shown:
                    yield ready[shown:]
                    shown = len(ready)
                if ended:
                    return

    def answers(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]) -> list[Answer]:
        """`params.n` answers per prompt, each about to begin, those to one prompt side by side. UserError as above."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts with {len(each)} sampling params", "give one for each, or for all")
        found: list[Answer] = []
        for prompt, its in zip(prompts, each, strict=True):
            ids = self._fitting(prompt)
            found += [Answer(self, ids, its, len(found) + j) for j in range(its.n)]
        return found

    def _finished(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """Answers each to its end, one after the other."""
        for answer in answers:
            answer.start()
            with closing(self._grow(answer)) as growing:
                for _ in growing:
                    pass
        return answers

    @abstractmethod
    def _grow(self, answer: Answer) -> Generator[None, None, None]:
        """Token after token of one answer until it ends."""

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids that the model has: of a text behind the token that begins one, or as they are given.

        Raises:
            UserError: neither text nor ids, none at all, or one outside the vocabulary.
        """
        if isinstance(prompt, str):
            ids = ([] if self.prefix_id is None else [self.prefix_id]) + self.encode(prompt)
        else:
            ids = token_ids(prompt)
        if not ids:
            raise UserError("the prompt is empty and there is no begin token", "give a prompt")
        self._check_ids(min(ids), max(ids))
        return ids

    def _fitting(self, prompt: Prompt) -> list[int]:
        """The same, with room for an answer in the context."""
        ids = self.prompt_ids(prompt)
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
        self._check_ids(low, high)

    def _check_ids(self, low: int, high: int) -> None:
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}",
                "use the tokenizer that belongs to the model",
            )
