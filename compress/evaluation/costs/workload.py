"""What is run to time a model: one prompt of known length, rows of its tokens, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UserError
from compress.evaluation.text import DEFAULT, read_text
from compress.runtime.protocol import Runtime, SamplingParams

PROMPT_TOKENS = 128
NEW_TOKENS = 32
BATCH_SIZES = (1, 4, 8)
REPEATS = 10
WARM_UP = 2


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
        UserError: lengths beyond the context, fewer than two new tokens, no batch size, fewer than ten repeats.
    """
    room = runtime.context_length
    if new_tokens is None:
        new_tokens = NEW_TOKENS if room is None else min(NEW_TOKENS, max(2, room // 4))
    if prompt_tokens is None:
        prompt_tokens = PROMPT_TOKENS if room is None else min(PROMPT_TOKENS, room - new_tokens)
    _check(room, prompt_tokens, new_tokens, batch_sizes, repeats)
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
