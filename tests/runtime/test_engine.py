"""The engine over a stand-in model whose cache is a table of tokens: every step checks what it would attend to."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.errors import UserError
from compress.evaluation.costs.process import resident_bytes
from compress.runtime import loading
from compress.runtime.answer import Answer
from compress.runtime.engine import Engine
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.paged_model import Chunk
from compress.runtime.pages import PagePool
from compress.runtime.protocol import SamplingParams
from compress.runtime.scheduler import Request

PAGE, VOCABULARY = 4, 50


class Reader:
    """A tokenizer of letters without end tokens."""

    end_ids: frozenset[int] = frozenset()
    context_length: int | None = None

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(ord("0") + token) for token in token_ids)


def following(tokens: Sequence[int]) -> int:
    """The next token: any function of all tokens so far."""
    return sum((i + 1) * token * 7919 for i, token in enumerate(tokens)) // 3 % VOCABULARY


class Model:
    """Keeps tokens where a model keeps keys and values, and answers from them alone."""

    def __init__(self, pages: int, step_tokens: int = 16, most_running: int = 8) -> None:
        self.pool = PagePool(pages, PAGE)
        self.memory: dict[tuple[int, int], int] = {}
        self.step_tokens = step_tokens
        self.most_running = most_running
        self.computed = self.largest = 0
        self.engine = Engine(self.step, self.pool, step_tokens=step_tokens, most_running=most_running)

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        assert 0 < sum(len(chunk.tokens) for chunk in chunks) <= self.step_tokens
        assert len(chunks) <= self.most_running
        self.largest = max(self.largest, len(chunks))
        wanted = []
        for chunk in chunks:
            self.computed += len(chunk.tokens)
            for at, token in enumerate(chunk.tokens, chunk.position):
                self.memory[chunk.pages[at // PAGE], at % PAGE] = token
        for chunk in chunks:
            end = chunk.position + len(chunk.tokens)
            seen = [self.memory[chunk.pages[at // PAGE], at % PAGE] for at in range(end)]
            wanted += [following(seen[: chunk.position + row + 1]) for row in chunk.rows]
        return torch.nn.functional.one_hot(torch.tensor(wanted, dtype=torch.int64), VOCABULARY).float()

    def add(self, prompt: list[int], tokens: int, priority: int = 0) -> tuple[Request, Answer]:
        answer = Answer(Reader(), prompt, SamplingParams(max_tokens=tokens), 0)
        return self.engine.add(answer, priority=priority), answer

    def run(self) -> None:
        while self.engine.busy:
            self.engine.step()
        assert self.pool.free == self.pool.count


def expected(prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(following(ids))
    return ids[len(prompt) :]


def test_answers_are_those_of_requests_alone() -> None:
    model = Model(pages=64)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], list(range(40)), [7]]
    answers = [model.add(prompt, 6 + i)[1] for i, prompt in enumerate(prompts)]
    model.run()
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.fresh == expected(prompt, 6 + i)
        assert answer.reason == "length"
        assert answer.generation().token_ids == tuple(answer.fresh)
    assert model.largest == 4


def test_a_long_prompt_does_not_hold_up_answers() -> None:
    """It is computed in what the other answers leave of each step."""
    model = Model(pages=64, step_tokens=8)
    _, short = model.add([1, 2], 30)
    model.engine.step()
    _, long = model.add(list(range(40)), 2)
    for done in range(2, 8):
        model.engine.step()
        assert len(short.fresh) == done
    assert long.fresh == expected(list(range(40)), 1)
    model.run()


def test_equal_beginnings_are_computed_once() -> None:
    model = Model(pages=64)
    prompt = list(range(18))
    _, first = model.add([*prompt, 1], 3)
    model.run()
    cold = model.computed
    _, second = model.add([*prompt, 2], 3)
    model.run()
    assert model.computed - cold == cold - 16
    assert (first.cached_tokens, second.cached_tokens) == (0, 16)
    assert second.fresh == expected([*prompt, 2], 3)
    _, again = model.add([*prompt, 2][:16], 3)  # all of its pages are known, its last token is computed all the same
    model.run()
    assert again.cached_tokens == 12
    assert again.fresh == expected([*prompt, 2][:16], 3)


def test_followers_share_the_pages_of_their_leader() -> None:
    model = Model(pages=64, step_tokens=8)
    prompt = list(range(21))
    params = SamplingParams(max_tokens=5)
    answers = [Answer(Reader(), prompt, params, i) for i in range(3)]
    leader = model.engine.add(answers[0])
    for answer in answers[1:]:
        model.engine.add(answer, leader=leader)
    model.run()
    assert [answer.fresh for answer in answers] == [expected(prompt, 5)] * 3
    assert [answer.cached_tokens for answer in answers] == [0, 20, 20]
    assert model.computed == 21 + 2 * 1 + 3 * 4


def test_requests_put_back_go_on_where_they_were() -> None:
    model = Model(pages=9)
    requests = [model.add([i, i + 1, i + 2], 20) for i in range(4)]
    model.run()
    assert sum(request.preemptions for request, _ in requests) > 0
    assert requests[0][0].preemptions == 0, "the first by rank is never put back"
    for i, (_, answer) in enumerate(requests):
        assert answer.fresh == expected([i, i + 1, i + 2], 20)


def test_priority_goes_before_arrival() -> None:
    model = Model(pages=64, most_running=1)
    order = []
    for name, priority in (("late", 2), ("first", 0), ("second", 0), ("between", 1)):
        request, _ = model.add([1, 2, 3], 2, priority)
        order.append((name, request))
    finished = []
    while model.engine.busy:
        for request in model.engine.step():
            if request.finished:
                finished.append(next(name for name, known in order if known is request))
    assert finished == ["first", "second", "between", "late"]


def test_cancelled_requests_free_their_pages() -> None:
    model = Model(pages=32, most_running=2)
    requests = [model.add([i, 2, 3], 20)[0] for i in range(4)]
    model.engine.step()
    for request in (*requests[1:], *requests[1:]):  # running and waiting ones, and again
        model.engine.cancel(request)
    model.run()
    assert not model.engine.busy


def test_what_can_never_fit_is_refused() -> None:
    model = Model(pages=4)
    with pytest.raises(UserError, match="do not fit the key-value cache of 16 tokens"):
        model.add([1, 2, 3], 13)
    _, answer = model.add([1, 2, 3], 12)
    model.run()
    assert answer.fresh == expected([1, 2, 3], 12)


def test_logits_that_are_not_finite_lose_no_page() -> None:
    model = Model(pages=8)
    model.engine = Engine(lambda chunks: torch.full((len(chunks), 3), torch.nan), model.pool)
    request, answer = model.add([1, 2, 3, 4, 5], 4)
    assert model.engine.step() == []
    assert (request.finished, answer.reason, model.engine.busy) == (True, None, False)
    assert (model.pool.free, model.pool.named) == (8, 0)


def many(requests: int, seed: int) -> None:
    """Random requests, some to one prompt, some cancelled, some failing, arriving while others run."""
    draw = random.Random(seed)
    model = Model(pages=24, step_tokens=draw.randint(4, 32), most_running=draw.randint(1, 8))
    model.engine._step = lambda chunks: broken_at_times(model.step(chunks), draw)
    beginnings = [[draw.randrange(VOCABULARY) for _ in range(30)] for _ in range(3)]
    live: dict[Request, tuple[list[int], int, Answer]] = {}
    begun = finished = failed = cancelled = 0
    while begun < requests or live:
        while len(live) < 12 and begun < requests and draw.random() < 0.7:
            prompt = [*draw.choice(beginnings)[: draw.randint(1, 30)], draw.randrange(VOCABULARY)]
            tokens, priority = draw.randint(1, 40), draw.randrange(3)
            leader: Request | None = None
            for _ in range(draw.choice((1, 1, 3))):  # answers to one prompt
                answer = Answer(Reader(), prompt, SamplingParams(max_tokens=tokens), 0)
                request = model.engine.add(answer, priority=priority, leader=leader)
                leader = leader or request
                live[request] = (prompt, tokens, answer)
                begun += 1
        model.engine.step()
        for request in [request for request in live if request.finished]:
            prompt, tokens, answer = live.pop(request)
            assert answer.fresh == expected(prompt, tokens)[: len(answer.fresh)]
            finished += answer.reason == "length"
            failed += answer.reason is None
        if live and draw.random() < 0.03:
            request = draw.choice(list(live))
            prompt, _, answer = live.pop(request)
            model.engine.cancel(request)
            assert answer.fresh == expected(prompt, len(answer.fresh))
            cancelled += 1
        if draw.random() < 0.02:
            model.pool.forget()
    assert not model.engine.busy
    assert model.pool.free == model.pool.count
    assert finished + failed + cancelled == begun
    assert min(finished, failed, cancelled) > 0


def broken_at_times(logits: Tensor, draw: random.Random) -> Tensor:
    """The same, one row of which is no number now and then."""
    if len(logits) and draw.random() < 0.03:
        logits[draw.randrange(len(logits)), 3] = torch.nan
    return logits


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_among_many(seed: int) -> None:
    many(60, seed)


@pytest.mark.slow
def test_nothing_is_lost_among_ten_thousand() -> None:
    many(10_000, 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_requests_leave_no_memory_taken(packaged_model: Path) -> None:
    """Over the real model, 120 at a time; memory is what it was after the first of them, but for the heap's gaps."""
    runtime = loading.load(packaged_model, device="cpu", prefix_cache=True)
    assert isinstance(runtime, NativeRuntime)
    draw = random.Random(0)
    held = []
    for _ in range(84):
        prompts = [[draw.randrange(3, 500) for _ in range(draw.randint(1, 12))] for _ in range(60)]
        params = SamplingParams(max_tokens=2, n=2, temperature=1.0, ignore_end=True)
        assert len(runtime.generate(prompts, params)) == 120
        runtime.model.pages.forget()
        held.append(resident_bytes(os.getpid()) or 0)
    assert not runtime.engine.busy
    assert runtime.model.pages.free == runtime.model.pages.count
    assert held[-1] < held[4] + 6_000_000
