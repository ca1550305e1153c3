"""The engine over a stand-in model whose cache is a table of tokens: every step checks what it would attend to."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from compress.errors import UserError
from compress.runtime.answer import Answer
from compress.runtime.engine import Engine
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
    """Random requests, some of them cancelled, arriving while others run."""
    draw = random.Random(seed)
    model = Model(pages=24, step_tokens=draw.randint(4, 32), most_running=draw.randint(1, 8))
    beginnings = [[draw.randrange(VOCABULARY) for _ in range(30)] for _ in range(3)]
    live: dict[Request, tuple[list[int], int, Answer]] = {}
    finished = cancelled = 0
    while finished + cancelled < requests:
        while len(live) < 12 and finished + cancelled + len(live) < requests and draw.random() < 0.7:
            prompt = [*draw.choice(beginnings)[: draw.randint(1, 30)], draw.randrange(VOCABULARY)]
            tokens = draw.randint(1, 40)
            request, answer = model.add(prompt, tokens, draw.randrange(3))
            live[request] = (prompt, tokens, answer)
        for request in model.engine.step():
            if request.finished:
                prompt, tokens, answer = live.pop(request)
                assert answer.fresh == expected(prompt, tokens)
                finished += 1
        if live and draw.random() < 0.02:
            request = draw.choice(list(live))
            prompt, _, answer = live.pop(request)
            model.engine.cancel(request)
            assert answer.fresh == expected(prompt, len(answer.fresh))
            cancelled += 1
    assert not model.engine.busy
    assert model.pool.free == model.pool.count
    assert min(finished, cancelled) > 0


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_among_many(seed: int) -> None:
    many(60, seed)


@pytest.mark.slow
def test_nothing_is_lost_among_ten_thousand() -> None:
    many(10_000, 0)
