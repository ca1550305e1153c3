"""What is run to time a model: one prompt of known length, rows of its tokens, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UserError
from compress.evaluation.text import DEFAULT, read_text
from compress.runtime.engine import MOST_RUNNING
from compress.runtime.loading import MOST_CACHE_TOKENS
from compress.runtime.paged_backend import PagedRuntime
from compress.runtime.paged_model import default_cache_tokens
from compress.runtime.protocol import Runtime, SamplingParams

PROMPT_TOKENS = 128
NEW_TOKENS = 32
BATCH_SIZES = (1, 4, 8)
REPEATS = 10
WARM_UP = 2
MOST_ROWS = 1024
PAGE_TOKENS = 32
"""Tokens that pages round an answer's up by, at most."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`prompt` as text; `rows` (largest batch, prompt_tokens) int64: its tokens, the begin token in front, and windows
    of the text that follows."""

    prompt: str
    rows: Tensor
    new_tokens: int
    batch_sizes: tuple[int, ...]
    repeats: int

    @property
    def sampling(self) -> SamplingParams:
        """Greedy, past end tokens, so that every answer is as long as asked."""
        return SamplingParams(max_tokens=self.new_tokens, ignore_end=True)


def plan(
    runtime: Runtime,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = REPEATS,
) -> Plan:
    """The work for one model. Lengths left out are 128 and 32, or what a short context has room for.

    The prompt is the beginning of the packaged text; where its text does not read back into as many tokens as asked,
    it is as long as it came out.

    Raises:
        UserError: lengths beyond the context, fewer than two new tokens, no batch size, or one whose answers are not
            computed all at once, fewer than ten repeats.
    """
    room = runtime.context_length
    if new_tokens is None:
        new_tokens = NEW_TOKENS if room is None else min(NEW_TOKENS, max(2, room // 4))
    if prompt_tokens is None:
        prompt_tokens = PROMPT_TOKENS if room is None else max(2, min(PROMPT_TOKENS, room - new_tokens))
    _check(room, prompt_tokens, new_tokens, batch_sizes, repeats)
    _check_together(runtime, prompt_tokens + new_tokens, max(batch_sizes))
    prompt, rows = _prompt(runtime, prompt_tokens, max(batch_sizes))
    return Plan(prompt, rows, new_tokens, tuple(sorted(set(batch_sizes))), repeats)


def _check(room: int | None, prompt_tokens: int, new_tokens: int, batch_sizes: Sequence[int], repeats: int) -> None:
    if new_tokens < 2:
        raise UserError(f"new_tokens is {new_tokens}; a decoding speed needs at least 2", "ask for 16 or more")
    if prompt_tokens < 2:
        raise UserError(f"prompt_tokens is {prompt_tokens}; a prompt needs at least 2", "ask for 16 or more")
    if room is not None and prompt_tokens + new_tokens > room:
        raise UserError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the model's context of {room}",
            "ask for fewer tokens (--prompt-tokens, --new-tokens)",
        )
    if not batch_sizes or min(batch_sizes) < 1:
        raise UserError(f"batch sizes {list(batch_sizes)}: at least one is needed, each 1 or more", "give 1,4,8")
    if repeats < REPEATS:
        raise UserError(f"repeats is {repeats}; a median with a 95% interval needs {REPEATS}", f"ask for {REPEATS}")


def _check_together(runtime: Runtime, tokens: int, batch: int) -> None:
    """No answer of a batch waits for another, which would be timed too."""
    most = MOST_RUNNING if runtime.batched_generate else MOST_ROWS
    if batch > most:
        raise UserError(f"{runtime.name} computes no {batch} rows at once", f"give --batch-sizes up to {most}")
    if not isinstance(runtime, PagedRuntime):
        return
    pages = runtime.model.pages
    if batch * pages.pages_for(tokens + 1) > pages.count:
        raise UserError(
            f"{batch} answers of {tokens} tokens with their prompts do not fit a key-value cache of "
            f"{pages.count * pages.tokens} tokens at once",
            "give smaller --batch-sizes, or load the model with a larger cache_tokens",
        )


def cache_tokens(prompt_tokens: int | None, new_tokens: int | None, batch_sizes: Sequence[int]) -> int | None:
    """Room that the largest batch needs of an engine's cache; None where any has it, or none can."""
    each = (PROMPT_TOKENS if prompt_tokens is None else prompt_tokens) + (
        NEW_TOKENS if new_tokens is None else new_tokens
    )
    wanted = min(max(batch_sizes, default=1), MOST_RUNNING) * (each + PAGE_TOKENS)
    return wanted if default_cache_tokens(0) < wanted <= MOST_CACHE_TOKENS else None


def _prompt(runtime: Runtime, tokens: int, batch: int) -> tuple[str, Tensor]:
    """The prompt and the rows: `tokens` each, or as near below as the tokenizer's spelling gives.

    Raises:
        UserError: the packaged text is shorter than one prompt.
    """
    begin = [] if runtime.prefix_id is None else [runtime.prefix_id]
    wanted = tokens - len(begin)
    ids = runtime.encode("\n".join(read_text(DEFAULT).documents))
    if len(ids) < wanted:
        raise UserError(f"the packaged text has no {tokens} tokens", "ask for a shorter prompt (--prompt-tokens)")
    prompt, read = "", list[int]()
    for length in range(wanted, max(0, wanted - 8), -1):  # cutting a text moves the borders of its last tokens
        text = runtime.decode(ids[:length])
        again = runtime.encode(text)
        if len(read) < len(again) <= wanted:
            prompt, read = text, again
        if len(again) == wanted:
            break
    if not read:
        raise UserError("the tokenizer does not read its own text back", "check the model's tokenizer files")
    stream = torch.tensor(ids)
    starts = (torch.arange(batch)[:, None] * len(read) + torch.arange(len(read))) % len(ids)
    rows = torch.cat([torch.tensor(begin, dtype=torch.int64).expand(batch, -1), stream[starts]], dim=1)
    rows[0] = torch.tensor([*begin, *read])
    return prompt, rows
