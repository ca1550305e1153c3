"""The text of an answer while its tokens come: every character once, as soon as no later token can change it.

Only the last finished piece is decoded again before what follows it, because many tokenizers drop a leading space of
what is decoded alone. A character may take several tokens; until the last of them decoding ends in U+FFFD, and bytes of
SentencePiece take the finished characters of their run with them, which is why those stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
_BEFORE = 8  # tokens of the prompt that are decoded before the answer's first


class Detokenizer:
    """Reads the tokens behind a prompt. `text` stays, `rest` may change: what is broken there may still be mended."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        """decode: text of token ids, special tokens left out."""
        self.text = self.rest = ""
        self._decode = decode
        self._last = list(prompt[-_BEFORE:])
        self._pending: list[int] = []

    @property
    def steady(self) -> str:
        """All text but the characters that are broken at its end."""
        return self.text + self.rest.rstrip(BROKEN)

    def extend(self, tokens: Sequence[int]) -> None:
        """Reads more tokens; the text is the same however they are divided among calls."""
        pending = [*self._pending, *tokens]
        before, whole = self._decode(self._last), self._decode(self._last + pending)
        piece = whole[len(before) :] if whole.startswith(before) else self._decode(pending)
        if len(tokens) > 1 and BROKEN in piece:
            for token in tokens:
                self.extend([token])
        elif piece and not piece.endswith(BROKEN):
            self.text += piece
            self.rest = ""
            self._last, self._pending = pending, []
        else:
            self.rest, self._pending = piece, pending
