"""Windows of equal length cut from a text, from documents or from conversations; which ones, a seed decides."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.calibration.rows import Message, Rows
from compress.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 64


def of_text(
    text: str, where: str, tokenizer: PreTrainedTokenizerBase, samples: int | None, seq_len: int, seed: int
) -> Tensor:
    """(samples, seq_len) int64: consecutive pieces of the text behind the begin token, without replacement.

    samples: None for all.
    """
    if not text.strip():
        raise UserError(f"calibration text {where} is empty", "give a text with at least some thousand words")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = _begin(tokenizer)
    payload = seq_len - len(begin)
    available = len(ids) // payload if payload > 0 else 0
    samples = max(1, available) if samples is None else samples
    _refuse_short(where, available, samples, seq_len)
    pieces = torch.tensor(ids[: available * payload], dtype=torch.int64).reshape(available, payload)
    return _behind(begin, pieces[_order(available, seed)[:samples]])


def of_rows(
    rows: Rows, where: str, tokenizer: PreTrainedTokenizerBase, samples: int | None, seq_len: int, seed: int
) -> Tensor:
    """(samples, seq_len) int64 from as many rows, in an order that the seed decides, as are needed.

    Documents follow one another, an end token behind each, and are cut wherever a window is full. Conversations are
    rendered by the model's chat template; every window begins where one does, and a conversation that reaches beyond
    its window is cut there, so that a model sees turns as it will when it serves.

    Raises:
        UserError: too few rows, or a model without a chat template, or one whose template refuses a conversation.
    """
    shuffled = [rows.items[place] for place in _order(len(rows.items), seed).tolist()]
    most = sys.maxsize if samples is None else samples
    if rows.kind == "rows":
        begin = _begin(tokenizer)
        length, found = seq_len - len(begin), _packed(_documents(shuffled, tokenizer), seq_len - len(begin), most)
    else:
        begin, length = [], seq_len  # the template writes the begin token
        found = _packed_from_starts(_conversations(shuffled, where, tokenizer), seq_len, most)
    samples = max(1, len(found)) if samples is None else samples
    _refuse_short(where, len(found), samples, seq_len)
    return _behind(begin, torch.tensor(found, dtype=torch.int64).reshape(samples, length))


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _behind(begin: list[int], pieces: Tensor) -> Tensor:
    start = torch.tensor(begin, dtype=torch.int64).expand(len(pieces), len(begin))
    return torch.cat([start, pieces], 1).contiguous()


def _refuse_short(where: str, available: int, samples: int, seq_len: int) -> None:
    if available < samples:
        raise UserError(
            f"calibration text {where} holds {available} windows of {seq_len} tokens, {samples} are asked for",
            ("" if available == 0 else f"use --samples {available}, or ") + "a shorter --seq-len, or a longer text",
        )


def _documents(texts: Sequence[object], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for first in range(0, len(texts), _BATCH):
        some = list(texts[first : first + _BATCH])
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [*ids, *end]


def _conversations(chats: Sequence[object], where: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    if not tokenizer.chat_template:
        raise UserError(
            f"calibration text {where} holds conversations, and the model has no chat template",
            "give plain text, or a model whose tokenizer has one",
        )
    for messages in chats:
        yield tokenizer(_rendered(messages, where, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]


def _rendered(messages: object, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))  # type: ignore[arg-type]
    except Exception as error:  # a template is a program of the model's makers, and may refuse in any way
        cause = " ".join(str(error).split())[:200]
        first: list[Message] = messages  # type: ignore[assignment]
        roles = ", ".join(message["role"] for message in first[:6])
        raise UserError(
            f"calibration text {where}: the model's chat template refuses a conversation of {roles}: {cause}",
            "give conversations of the form that the model was trained on",
        ) from error


def _packed(documents: Iterator[list[int]], length: int, samples: int) -> list[list[int]]:
    stream: list[int] = []
    for ids in documents:
        stream += ids
        if len(stream) >= samples * length:
            break
    count = min(samples, len(stream) // length if length > 0 else 0)
    return [stream[place * length : (place + 1) * length] for place in range(count)]


def _packed_from_starts(conversations: Iterator[list[int]], length: int, samples: int) -> list[list[int]]:
    found: list[list[int]] = []
    window: list[int] = []
    for ids in conversations:
        window += ids
        if len(window) >= length:
            found.append(window[:length])
            window = []
        if len(found) == samples:
            break
    return found
