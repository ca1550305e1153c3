"""One sequence over pages of an engine, which grows by several tokens at a time and can be taken back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compress.runtime.paged_model import Chunk, PagedModel


class PagedSequence:
    """What is taken back is overwritten; a page of int2 that was full is computed again from its first token on."""

    def __init__(self, model: PagedModel, pages: Sequence[int], length: int) -> None:
        """pages: room for all tokens that there will be at a time. length: of the longest sequence in the end."""
        self.ids: list[int] = []
        self._model, self._pages, self._length = model, pages, length
        self._filled = 0  # every page that ends before is full

    def extend(self, tokens: Sequence[int], rows: Sequence[int] | None = None) -> Tensor:
        """Logits (rows, vocabulary) float32 behind tokens, which are added: behind all, or those of indices `rows`."""
        return self._model.in_steps(self.chunk(tokens, range(len(tokens)) if rows is None else rows))

    def chunk(self, tokens: Sequence[int], rows: Sequence[int]) -> Chunk:
        """What computes tokens, which are added, and has to be computed before anything else of the sequence."""
        start = len(self.ids)
        begin = self._writable(start)
        self.ids += tokens
        self._filled = len(self.ids)
        behind = [start - begin + row for row in rows]
        return Chunk(self.ids[begin:], begin, self._pages, behind, self._model.long(self._length))

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        del self.ids[length:]

    def _writable(self, position: int) -> int:
        """From where on tokens have to be computed for one at `position` to be kept."""
        first = position - position % self._model.pages.tokens
        closed = self._model.open_page_bytes > 0 and first + self._model.pages.tokens <= self._filled
        return first if closed else position
