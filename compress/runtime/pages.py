"""Pages of the key-value cache: who uses them, and which still hold what somebody may ask for again. Free of torch.

A full page can be given a digest, which stands for its tokens and all tokens before them. While its content lasts, a
sequence that begins with the same tokens shares the page instead of computing it. A page that nobody uses keeps its
content until its place is needed; the one unused for longest goes first.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from compress.errors import WorkError


class PagePool:
    """`count` pages of `tokens` tokens each. A page is empty, used by some, or idle: named and used by nobody."""

    def __init__(self, count: int, tokens: int) -> None:
        self.count = count
        self.tokens = tokens
        self._untouched = 0  # this page and those behind it were never taken: memory is touched only as it is needed
        self._empty: list[int] = []  # a heap of the other empty ones, the lowest first
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one unused for longest first
        self._users: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._empty) + len(self._idle) + self.count - self._untouched

    @property
    def named(self) -> int:
        """Pages that can be shared."""
        return len(self._digest_of)

    def pages_for(self, tokens: int) -> int:
        """How many pages so many tokens fill."""
        return -(-tokens // self.tokens)

    def take(self, tokens: int) -> list[int]:
        """Pages for so many tokens, whose content is lost.

        Raises:
            WorkError: there are not so many free ones.
        """
        wanted = self.pages_for(tokens)
        if wanted > self.free:
            raise WorkError(
                f"the key-value cache has {self.free * self.tokens} tokens free, and {wanted * self.tokens} are needed",
                "use shorter prompts or fewer new tokens",
            )
        taken = [self._next_free() for _ in range(wanted)]
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning; their user is one more."""
        found: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._idle.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1
            found.append(page)
        return found

    def name(self, page: int, digest: bytes) -> None:
        """From now on a used, full page can be shared; where another page has the digest already, that one stays it."""
        if page not in self._users:
            raise ValueError(f"page {page} is not lent")
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def give_back(self, pages: Sequence[int]) -> None:
        """One user less for each page. ValueError for one that nobody uses."""
        for page in reversed(pages):  # ends of sequences are asked for again less often than beginnings
            users = self._users.get(page, 0)
            if users == 0:
                raise ValueError(f"page {page} is not lent")
            if users > 1:
                self._users[page] = users - 1
                continue
            del self._users[page]
            if page in self._digest_of:
                self._idle[page] = None
            else:
                heapq.heappush(self._empty, page)

    def forget(self) -> None:
        """No page can be shared any more."""
        self._page_of.clear()
        self._digest_of.clear()
        self._empty = sorted([*self._empty, *self._idle])
        self._idle.clear()

    @contextmanager
    def lend(self, tokens: int) -> Iterator[list[int]]:
        """Pages for so many tokens, given back at the end."""
        pages = self.take(tokens)
        try:
            yield pages
        finally:
            self.give_back(pages)

    def _next_free(self) -> int:
        if self._empty:
            return heapq.heappop(self._empty)
        if self._untouched < self.count:
            self._untouched += 1
            return self._untouched - 1
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        return page


def chained_digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a page's tokens behind the page with digest `before` (empty for the first)."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()
