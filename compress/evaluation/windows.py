"""A text as token windows: never beyond the trained context, never across documents, a begin token at the front.

A document is cut into windows of equal length and a shorter last one, so that all of its text is scored. Every window
is scored alone, so its result does not depend on how windows are batched. The clusters of the statistics are documents
where there are at least 30 of them, else blocks of about 2,048 tokens: neighbouring tokens are alike, documents and
blocks nearly independent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.errors import UserError
from compress.evaluation.window_sizes import (
    MIN_CLUSTERS,
    MIN_DOCUMENTS,
    fewest_tokens,
    fewest_windows,
    standard_window,
    windows_per_block,
)
from compress.runtime.protocol import Runtime

ClusterKind = Literal["documents", "blocks"]


@dataclass(frozen=True, eq=False, slots=True)
class Windows:
    """Token windows (count, seq_len) int64; window i is its first `lengths[i]` tokens, scored on all but the first.

    lengths (count,) int64; what follows a shorter window's tokens is padding. text_bytes (count,) int64: UTF-8 bytes of
    the scored tokens' text. cluster (count,) int64: the window's cluster, 0 .. clusters - 1, never decreasing.
    `text_tokens` is the number of tokens of the whole text.
    """

    tokens: Tensor
    lengths: Tensor
    text_bytes: Tensor
    cluster: Tensor
    cluster_kind: ClusterKind
    text_tokens: int

    @property
    def seq_len(self) -> int:
        """Tokens of a whole window, begin token included."""
        return int(self.tokens.shape[1])

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return int(self.cluster[-1]) + 1

    @property
    def scored(self) -> int:
        """Number of tokens that are predicted and scored."""
        return int((self.lengths - 1).sum())

    def sha256(self) -> str:
        """Hash of lengths, ids and clusters: records with equal hashes were scored on the same tokens, summed alike."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        for part in (self.lengths, self.tokens, self.cluster):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Piece:
    """One window before padding: its document, its tokens (begin token included), the bytes of its scored text."""

    document: int
    ids: list[int]
    text_bytes: int


def cut(
    documents: Sequence[str], runtime: Runtime, *, seq_len: int | None = None, max_tokens: int | None = None
) -> Windows:
    """Cuts documents into windows of `seq_len` (default: 512, or the context where that is shorter).

    The begin token counts towards `seq_len` and is not scored; without one a window's first token is not scored.
    `max_tokens` bounds the scored tokens; the windows kept are spread evenly over the text, because its beginning is
    rarely typical.

    Raises:
        UserError: a text too short for two clusters, or `seq_len` or `max_tokens` out of range.
    """
    length = _length(runtime, seq_len)
    pieces: list[_Piece] = []
    text_tokens = 0
    for index, document in enumerate(documents):
        ids = runtime.encode(document)
        text_tokens += len(ids)
        pieces += _pieces(index, document, ids, runtime, length)
    chosen = pieces if max_tokens is None else _spread(pieces, max_tokens)
    kind, cluster = _clusters(chosen, length)
    if not cluster or cluster[-1] + 1 < MIN_CLUSTERS:
        raise _too_short(pieces, chosen, text_tokens, length, max_tokens)
    tokens = torch.zeros(len(chosen), length, dtype=torch.int64)
    for row, piece in zip(tokens, chosen, strict=True):
        row[: len(piece.ids)] = torch.tensor(piece.ids)
    return Windows(
        tokens,
        torch.tensor([len(piece.ids) for piece in chosen]),
        torch.tensor([piece.text_bytes for piece in chosen]),
        torch.tensor(cluster),
        kind,
        text_tokens,
    )


def _pieces(index: int, document: str, ids: list[int], runtime: Runtime, length: int) -> list[_Piece]:
    """The windows of one document, in order. A window with nothing to score is none."""
    prefix = [] if runtime.prefix_id is None else [runtime.prefix_id]
    unscored = 1 - len(prefix)  # text tokens of a window that are not scored
    stride = length - len(prefix)
    starts = [start for start in range(0, len(ids), stride) if len(ids) - start > unscored]
    ends = [min(start + stride, len(ids)) for start in starts]
    spans = [(start + unscored, end) for start, end in zip(starts, ends, strict=True)]
    sizes = _span_bytes(document, ids, spans, runtime)
    return [_Piece(index, prefix + ids[start:end], size) for start, end, size in zip(starts, ends, sizes, strict=True)]


def _span_bytes(document: str, ids: list[int], spans: list[tuple[int, int]], runtime: Runtime) -> list[int]:
    """UTF-8 bytes of the text of each span of tokens.

    A tokenizer gives no bytes per token, and a span decoded alone can lose a space or half a character. So the
    document's own bytes are divided in proportion to the spans' decoded lengths: exact for a document as a whole, and
    for its parts where decoding gives the text back.
    """
    lengths: list[int] = []
    scored: list[bool] = []
    at = 0
    for start, end in spans:
        for a, b, counts in ((at, start, False), (start, end, True)):
            if b > a:
                lengths.append(len(runtime.decode(ids[a:b]).encode()))
                scored.append(counts)
        at = end
    if at < len(ids):
        lengths.append(len(runtime.decode(ids[at:]).encode()))
        scored.append(False)
    whole, total = len(document.encode()), sum(lengths)
    if total == 0:
        return [0] * len(spans)
    edges, seen = [0], 0
    for each in lengths:
        seen += each
        edges.append(round(whole * seen / total))
    return [b - a for a, b, counts in zip(edges, edges[1:], scored, strict=False) if counts]


def _spread(pieces: list[_Piece], max_tokens: int) -> list[_Piece]:
    """The largest number of evenly spread windows found, from the mean window's size down, within `max_tokens`."""
    total = sum(len(piece.ids) - 1 for piece in pieces)
    if not pieces or total <= max_tokens:
        return pieces
    keep = min(len(pieces), max(0, max_tokens) * len(pieces) // total)
    while keep:
        chosen = [pieces[i * len(pieces) // keep] for i in range(keep)]
        if sum(len(piece.ids) - 1 for piece in chosen) <= max_tokens:
            return chosen
        keep -= 1
    return []


def _clusters(pieces: list[_Piece], length: int) -> tuple[ClusterKind, list[int]]:
    """What a cluster is, and the cluster of each window."""
    documents = sorted({piece.document for piece in pieces})
    if len(documents) >= MIN_DOCUMENTS:
        number = {document: index for index, document in enumerate(documents)}
        return "documents", [number[piece.document] for piece in pieces]
    per_block = windows_per_block(length)
    return "blocks", [index // per_block for index in range(len(pieces))]


def _too_short(
    pieces: list[_Piece], chosen: list[_Piece], text_tokens: int, length: int, max_tokens: int | None
) -> UserError:
    needed = fewest_windows(length)
    if max_tokens is not None and len(chosen) < needed <= len(pieces):
        return UserError(
            f"max_tokens {max_tokens} leaves {len(chosen)} windows of {length}; an interval needs {needed}",
            f"give --max-tokens of at least {fewest_tokens(length)}",
        )
    return UserError(
        f"the evaluation text has {text_tokens} tokens; windows of {length} need {needed * length} for an interval",
        "give a longer text or a smaller --seq-len",
    )


def _length(runtime: Runtime, seq_len: int | None) -> int:
    context = runtime.context_length
    length = standard_window(context) if seq_len is None else seq_len
    if length < 2:
        raise UserError(f"seq_len is {length}; a window needs at least 2 tokens", "choose a larger --seq-len")
    if context is not None and length > context:
        raise UserError(
            f"seq_len {length} exceeds the context of {context} that {runtime.path} was trained for",
            f"choose --seq-len {context} or less",
        )
    return length
