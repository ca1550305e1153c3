"""Which tokens of which requests the next step computes. Free of torch.

One budget of tokens per step serves both kinds of work: the next token of every answer first, then prompts, in chunks
where they are longer than what is left. Where pages run out, the last request by rank is put back and computed again
later (its digests mostly still lead to its pages); what it has answered so far stays.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from compress.runtime.pages import PagePool, chained_digest


@dataclass(eq=False, slots=True)
class Request:
    """A prompt being answered. `ids`: prompt and answer so far; `computed` of them are in `pages`.

    Lower `priority` goes first, then lower `arrival`. A request with a `leader` begins when the leader's prompt is
    computed, because it shares its pages. What is `long` shares none with what is not. `shared_tokens`: found in the
    cache when it last began.
    """

    ids: list[int]
    priority: int = 0
    arrival: int = 0
    leader: Request | None = None
    long: bool = False
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    shared_tokens: int = 0
    preemptions: int = 0
    finished: bool = False
    _digests: list[bytes] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        """Requests of lower rank go first."""
        return self.priority, self.arrival

    @property
    def left(self) -> int:
        """Tokens to be computed before the next can be chosen."""
        return len(self.ids) - self.computed

    @property
    def ready(self) -> bool:
        """Whether nothing keeps it from beginning."""
        return self.leader is None or self.leader.finished or self.leader.left <= 1

    def digests(self, tokens: int, count: int) -> list[bytes]:
        """Of its first `count` pages of `tokens` tokens."""
        for page in range(len(self._digests), count):
            before = self._digests[-1] if self._digests else b"long" * self.long
            self._digests.append(chained_digest(before, self.ids[page * tokens : (page + 1) * tokens]))
        return self._digests[:count]


class Scheduler:
    """Requests waiting and running over one pool. `step_tokens` in one step, `most_running` requests at a time."""

    def __init__(self, pool: PagePool, step_tokens: int, most_running: int) -> None:
        self.pool = pool
        self.step_tokens = step_tokens
        self.most_running = most_running
        self.waiting: list[Request] = []  # both in the order of rank
        self.running: list[Request] = []
        self._arrivals = 0

    def add(self, request: Request) -> None:
        """Takes a request on, behind those of its priority that came before."""
        self._arrivals += 1
        request.arrival = self._arrivals
        bisect.insort(self.waiting, request, key=_rank)

    def drop(self, request: Request) -> None:
        """Ends a request, whatever state it is in; dropping it again does nothing."""
        if request.finished:
            return
        request.finished = True
        if request in self.running:
            self.running.remove(request)
            self.pool.give_back(request.pages)
            request.pages = []
        else:
            self.waiting.remove(request)

    def plan(self) -> list[tuple[Request, int]]:
        """The requests of the next step, and how many of their tokens it computes; pages for them are taken."""
        planned: dict[Request, int] = {}
        left, interrupted = self.step_tokens, False
        for request in sorted(self.running, key=lambda request: request.left > 1):
            if left == 0:
                break
            if request not in self.running:
                continue  # put back for another's sake
            count = min(left, request.left)
            while not self._extend(request, request.computed + count):
                victim = self.running[-1]
                left += planned.pop(victim, 0)
                self._put_back(victim)
                interrupted = True
                if victim is request:
                    break
            else:
                planned[request] = count
                left -= count
        if not interrupted:
            self._admit(planned, left)
        return list(planned.items())

    def computed(self, request: Request, count: int) -> None:
        """So many more tokens of a running request are in its pages; full ones can be shared from now on."""
        size = self.pool.tokens
        first = request.computed // size
        request.computed += count
        for page, digest in enumerate(request.digests(size, request.computed // size)[first:], first):
            self.pool.name(request.pages[page], digest)

    def _admit(self, planned: dict[Request, int], left: int) -> None:
        for request in list(self.waiting):
            if left == 0 or len(self.running) >= self.most_running:
                return
            if not request.ready:
                continue
            if not self._begin(request):
                return
            count = min(left, request.left)
            planned[request] = count
            left -= count

    def _begin(self, request: Request) -> bool:
        """Moves a waiting request to the running ones if all that is known of it, and one token more, has room."""
        size = self.pool.tokens
        shared = self.pool.share(request.digests(size, (len(request.ids) - 1) // size))
        if self.pool.pages_for(len(request.ids) + 1) - len(shared) > self.pool.free:
            self.pool.give_back(shared)
            return False
        request.pages = shared + self.pool.take(len(request.ids) - len(shared) * size)
        request.computed = request.shared_tokens = len(shared) * size
        self.waiting.remove(request)
        bisect.insort(self.running, request, key=_rank)
        return True

    def _extend(self, request: Request, tokens: int) -> bool:
        """Pages for so many tokens of a running request, if there are so many."""
        missing = self.pool.pages_for(tokens) - len(request.pages)
        if missing > self.pool.free:
            return False
        if missing > 0:
            request.pages += self.pool.take(missing * self.pool.tokens)
        return True

    def _put_back(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.give_back(request.pages)
        request.pages, request.computed = [], 0
        request.preemptions += 1
        bisect.insort(self.waiting, request, key=_rank)


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
