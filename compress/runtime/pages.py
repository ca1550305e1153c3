"""Pages of the key-value cache: which are free, and which belong to whom. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from compress.errors import WorkError


class PagePool:
    """`count` pages of `tokens` tokens each, lent out and given back."""

    def __init__(self, count: int, tokens: int) -> None:
        self.count = count
        self.tokens = tokens
        self._free = list(range(count - 1, -1, -1))
        self._lent: set[int] = set()

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def take(self, tokens: int) -> list[int]:
        """Pages for so many tokens, the lowest free ones.

        Raises:
            WorkError: there are not so many free ones.
        """
        wanted = -(-tokens // self.tokens)
        if wanted > len(self._free):
            raise WorkError(
                f"the key-value cache has {len(self._free) * self.tokens} tokens free, and {wanted * self.tokens} are "
                "needed",
                "use shorter prompts or fewer new tokens",
            )
        taken = [self._free.pop() for _ in range(wanted)]
        self._lent.update(taken)
        return taken

    def give_back(self, pages: list[int]) -> None:
        """Pages that `take` gave. ValueError for one that is not lent."""
        for page in pages:
            if page not in self._lent:
                raise ValueError(f"page {page} is not lent")
            self._lent.remove(page)
        self._free = sorted({*self._free, *pages}, reverse=True)

    @contextmanager
    def lend(self, tokens: int) -> Iterator[list[int]]:
        """Pages for so many tokens, given back at the end."""
        pages = self.take(tokens)
        try:
            yield pages
        finally:
            self.give_back(pages)
