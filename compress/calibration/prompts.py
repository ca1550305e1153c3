"""Prompts that a model is to answer: lines of a text, or rows and conversations, as token ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.calibration.mix import short_name
from compress.calibration.rows import Message, decoded, read_rows
from compress.calibration.tokens import ROW_FILES, find
from compress.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, slots=True)
class Prompts:
    """Token ids of each prompt, the begin token among them; `sha256` is over these."""

    name: str
    kind: str
    ids: list[list[int]]
    sha256: str


def read_prompts(source: str, tokenizer: PreTrainedTokenizerBase, cut: int | None) -> Prompts:
    """The prompts of a packaged text's name or a file: each line of a text that is not empty, each row of a JSONL, JSON
    or Parquet file. Of a conversation the prompt is all before the last answer, rendered by the chat template.

    cut: tokens that are left of a longer prompt; None leaves all.

    Raises:
        UserError: no such file, no prompt in it, or conversations for a model without a chat template.
    """
    path = find(source)
    if path.suffix in ROW_FILES:
        rows = read_rows(path)
        kind: str = rows.kind
        texts = [row if isinstance(row, str) else _rendered(row, str(path), tokenizer) for row in rows.items]
    else:
        kind = "text"
        texts = [line.strip() for line in decoded(path.read_bytes(), path).splitlines() if line.strip()]
    if not texts:
        raise UserError(f"{path} holds no prompt", "give one prompt per line, or JSONL rows with a string `text`")
    begin = [] if tokenizer.bos_token_id is None or kind == "chat" else [tokenizer.bos_token_id]
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [(begin + list(each))[:cut] for each in found]
    return Prompts(short_name(source), kind, ids, hashlib.sha256(json.dumps(ids).encode()).hexdigest())


def _rendered(messages: list[Message], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"{where} holds conversations, and the model has no chat template", "give plain prompts, one per line"
        )
    asked = list(messages)
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    try:
        return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of the model's makers, and may refuse in any way
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where}: the model's chat template refuses a conversation: {cause}",
            "give conversations of the form that the model was trained on",
        ) from error
