"""Text as token windows: equal lengths, a begin token at the front of each, never beyond the trained context.

Every window is scored alone, so its result does not depend on how windows are batched. Windows are grouped into blocks
of about 2,048 tokens, the clusters of the statistics: neighbouring tokens are alike, blocks nearly independent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UserError
from compress.runtime.protocol import Runtime

DEFAULT_SEQ_LEN = 512
BLOCK_TOKENS = 2048
MIN_BLOCKS = 2


@dataclass(frozen=True, eq=False, slots=True)
class Windows:
    """Token windows (count, seq_len) int64, each scored on its tokens 1 .. seq_len - 1.

    `per_block` consecutive windows form a block. `text_tokens` is the number of tokens of the whole text.
    """

    tokens: Tensor
    per_block: int
    text_tokens: int

    @property
    def seq_len(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def blocks(self) -> int:
        return -(-len(self.tokens) // self.per_block)

    @property
    def scored(self) -> int:
        """Number of tokens that are predicted and scored."""
        return len(self.tokens) * (self.seq_len - 1)

    def sha256(self) -> str:
        """Hash of the shape and the ids: records with equal hashes were scored on the same tokens in the same order."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.to(torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()


def cut(text: str, runtime: Runtime, *, seq_len: int | None = None, max_tokens: int | None = None) -> Windows:
    """Cuts a text into windows of `seq_len` (default: 512, or the context where that is shorter).

    The begin token counts towards `seq_len` and is not scored. A tail shorter than a window is left out. `max_tokens`
    bounds the scored tokens; the windows kept are spread evenly over the text, because its beginning is rarely typical.

    Raises:
        UserError: an empty or too short text, or `seq_len` or `max_tokens` out of range.
    """
    length = _length(runtime, seq_len)
    prefix = [] if runtime.prefix_id is None else [runtime.prefix_id]
    if not text.strip():
        raise UserError("the evaluation text is empty", "give a text with at least a few thousand words")
    ids = runtime.encode(text)
    stride = length - len(prefix)
    count = len(ids) // stride
    per_block = max(1, BLOCK_TOKENS // length)
    needed = (MIN_BLOCKS - 1) * per_block + 1
    if count < needed:
        raise UserError(
            f"the evaluation text has {len(ids)} tokens; windows of {length} need {needed * stride} for an interval",
            "give a longer text or a smaller --seq-len",
        )
    chosen = list(range(count))
    if max_tokens is not None:
        keep = min(count, max_tokens // (length - 1))
        if keep < needed:
            raise UserError(
                f"max_tokens {max_tokens} leaves {keep} windows of {length}; an interval needs {needed}",
                f"give --max-tokens of at least {needed * (length - 1)}",
            )
        chosen = [i * count // keep for i in range(keep)]
    rows = [prefix + ids[i * stride : (i + 1) * stride] for i in chosen]
    return Windows(torch.tensor(rows, dtype=torch.int64), per_block, len(ids))


def _length(runtime: Runtime, seq_len: int | None) -> int:
    context = runtime.context_length
    length = min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN) if seq_len is None else seq_len
    if length < 2:
        raise UserError(f"seq_len is {length}; a window needs at least 2 tokens", "choose a larger --seq-len")
    if context is not None and length > context:
        raise UserError(
            f"seq_len {length} exceeds the context of {context} that {runtime.path} was trained for",
            f"choose --seq-len {context} or less",
        )
    return length
