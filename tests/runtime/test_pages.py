"""The pool of cache pages: what is free, used and shared adds up after any sequence of calls."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from compress.errors import WorkError
from compress.runtime.pages import PagePool, chained_digest

COUNT = 6


def test_pages_are_lent_once_and_come_back() -> None:
    pool = PagePool(4, 32)
    first = pool.take(33)
    assert (first, pool.free) == ([0, 1], 2)
    with pytest.raises(WorkError, match="64 tokens free"):
        pool.take(65)
    with pool.lend(64) as pages:
        assert not set(pages) & set(first)
    pool.give_back(first)
    assert pool.free == 4
    with pytest.raises(ValueError, match="not lent"):
        pool.give_back(first)
    with pytest.raises(ValueError, match="not lent"):
        pool.name(first[0], b"x")


def test_named_pages_are_shared_until_their_place_is_needed() -> None:
    pool = PagePool(3, 1)
    pages = pool.take(3)
    for page, digest in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.name(page, digest)
    assert pool.share([b"a", b"x", b"c"]) == pages[:1]
    pool.give_back(pages)
    assert pool.free == 2
    assert pool.take(1) == pages[2:], "the end of a sequence goes before its beginning"
    assert pool.share([b"b"]) == pages[1:2]
    pool.give_back(pages)
    assert pool.share([b"c"]) == []


def test_forgotten_pages_are_not_shared() -> None:
    pool = PagePool(2, 1)
    pages = pool.take(2)
    pool.name(pages[0], b"a")
    pool.name(pages[1], b"b")
    pool.give_back(pages[:1])
    pool.forget()
    assert (pool.share([b"a"]), pool.share([b"b"]), pool.named, pool.free) == ([], [], 0, 1)
    pool.give_back(pages[1:])
    assert sorted(pool.take(2)) == pages


def test_a_digest_stands_for_all_tokens_before() -> None:
    first, other = chained_digest(b"", [1, 2]), chained_digest(b"", [1, 3])
    assert chained_digest(first, [4]) == chained_digest(first, [4])
    assert len({first, other, chained_digest(first, [4]), chained_digest(other, [4]), chained_digest(b"", [4])}) == 5


class Pool(RuleBasedStateMachine):
    """Beside the pool, a plain account: who holds which pages, and what each page's content was named."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(COUNT, 1)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # of named pages, until they are taken afresh

    @rule(count=st.integers(0, COUNT + 1))
    def take(self, count: int) -> None:
        if count > self.pool.free:
            with pytest.raises(WorkError):
                self.pool.take(count)
            return
        pages = self.pool.take(count)
        assert not set(pages) & {page for held in self.held for page in held}
        for page in pages:
            self.content.pop(page, None)
        self.held.append(pages)

    @rule(which=st.integers(0, 9), digest=st.sampled_from([b"a", b"b", b"c"]))
    def name(self, which: int, digest: bytes) -> None:
        pages = [page for held in self.held for page in held]
        if pages:
            page = pages[which % len(pages)]
            self.pool.name(page, digest)
            if page not in self.content and digest not in self.content.values():
                self.content[page] = digest

    @rule(digests=st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=3))
    def share(self, digests: list[bytes]) -> None:
        pages = self.pool.share(digests)
        for page, digest in zip(pages, digests, strict=False):
            assert self.content[page] == digest
        if len(pages) < len(digests):
            assert digests[len(pages)] not in self.content.values()
        self.held.append(pages)

    @rule(which=st.integers(0, 9))
    def give_back(self, which: int) -> None:
        if self.held:
            self.pool.give_back(self.held.pop(which % len(self.held)))

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.content.clear()

    @invariant()
    def adds_up(self) -> None:
        used = Counter(page for held in self.held for page in held)
        assert self.pool.free + len(used) == COUNT
        assert self.pool.named == len(self.content)
        assert self.pool._users == dict(used)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
