"""Prompts and answers as windows of one length, of which only the answers count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import UserError


def windows(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], seq_len: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Tokens (windows, seq_len) int64 and which of them are of an answer (bool), in an order that the seed decides.

    Every window begins where a prompt does and holds as many whole pairs as fit; an answer is cut where even the first
    does not. What is left of a window is zeros that do not count, behind all that does.

    Raises:
        UserError: a prompt that leaves no room for its answer, or no answer at all.
    """
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens: list[list[int]] = []
    counted: list[list[bool]] = []
    for place in order:
        prompt, answer = prompts[place], answers[place]
        if not answer:
            continue  # the teacher had nothing to say
        if len(prompt) >= seq_len:
            raise UserError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer in windows of {seq_len}",
                "raise --seq-len, or set `answers.prompt_tokens` in the recipe to cut prompts",
            )
        if not tokens or len(tokens[-1]) + len(prompt) + len(answer) > seq_len:
            tokens.append([])
            counted.append([])
        tokens[-1] += [*prompt, *answer]
        counted[-1] += [False] * len(prompt) + [True] * len(answer)
    if not tokens:
        raise UserError("the teacher answered every prompt with nothing", "give other prompts, or another --seed")
    shape = (len(tokens), seq_len)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, (some, flags) in enumerate(zip(tokens, counted, strict=True)):
        ids[row, : len(some)] = torch.tensor(some[:seq_len])
        mask[row, : len(some)] = torch.tensor(flags[:seq_len])
    return ids, mask
