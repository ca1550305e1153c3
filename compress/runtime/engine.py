"""Many answers at once over one paged model: plan a step, compute it in one call, choose the tokens, repeat.

Nothing here makes a token depend on what else is in its step, nor on whether its prompt came from the cache, in chunks,
or whole. Where the model's kernels sum every output in one order (the native ones do), so is an answer, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compress.errors import UserError
from compress.runtime.answer import Answer
from compress.runtime.paged_model import STEP_TOKENS, Chunk
from compress.runtime.pages import PagePool
from compress.runtime.sampling import choose_finite
from compress.runtime.scheduler import Request, Scheduler

MOST_RUNNING = 64

Step = Callable[[Sequence[Chunk]], Tensor]
"""Computes chunks; logits (wanted rows, vocabulary)."""


class Engine:
    """Answers requests over a model's pages. One thread at a time."""

    def __init__(
        self, step: Step, pool: PagePool, *, step_tokens: int = STEP_TOKENS, most_running: int = MOST_RUNNING
    ) -> None:
        """step_tokens: at most so many tokens of all requests in one step. most_running: requests in one step."""
        self._step = step
        self._pool = pool
        self._scheduler = Scheduler(pool, step_tokens, most_running)
        self._answers: dict[Request, Answer] = {}

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._answers)

    def add(self, answer: Answer, *, priority: int = 0, leader: Request | None = None, long: bool = False) -> Request:
        """Takes a request on. Lower `priority` goes first; `leader`: a request with the same prompt; `long`: of chunks.

        Raises:
            UserError: the cache cannot hold the prompt and its longest answer.
        """
        capacity = self._pool.count * self._pool.tokens
        if len(answer.prompt) + answer.limit + 1 > capacity:
            raise UserError(
                f"{len(answer.prompt)} tokens and an answer of up to {answer.limit} do not fit the key-value cache of "
                f"{capacity} tokens",
                "shorten the prompt, ask for fewer tokens, or give a larger cache_tokens",
            )
        request = Request(list(answer.prompt), priority, leader=leader, long=long)
        self._answers[request] = answer
        self._scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request and frees its pages; a finished one stays as it is."""
        self._scheduler.drop(request)
        self._answers.pop(request, None)

    def step(self) -> list[Request]:
        """Computes one step; the requests whose answers grew, finished ones among them.

        A request whose logits are not finite ends without a reason in its answer; what it computed is not shared.
        """
        work = self._scheduler.plan()
        chunks = [
            Chunk(
                request.ids[request.computed : request.computed + count],
                request.computed,
                request.pages,
                [count - 1] if count == request.left else [],
                request.long,
            )
            for request, count in work
        ]
        if not chunks:
            return []
        logits = self._step(chunks)
        ending = [request for request, count in work if count == request.left]
        finite = torch.isfinite(logits).all(-1)
        if not bool(finite.all()):
            for request, fine in zip(ending, finite.tolist(), strict=True):
                if not fine:
                    self.cancel(request)
            work = [(request, count) for request, count in work if not request.finished]
            logits = logits[finite]
        for request, count in work:
            self._scheduler.computed(request, count)
        grown = [request for request in ending if not request.finished]
        answers = [self._answers[request] for request in grown]
        tokens = choose_finite(logits, [answer.sampler for answer in answers])
        for request, answer, token in zip(grown, answers, tokens, strict=True):
            if not answer.fresh:
                answer.cached_tokens = request.shared_tokens
            answer.take(token)
            request.ids.append(token)
            if answer.reason is not None:
                self.cancel(request)
        return grown
