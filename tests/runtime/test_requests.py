"""Prompts of one call with parameters of their own: what they change, their order, and what they share."""

from __future__ import annotations

from pathlib import Path

import pytest

import compress
from compress.errors import UserError
from compress.runtime.engine import Engine
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.protocol import SamplingParams

PROMPTS = ["The king", "Once upon a time there was a little girl", "A"]


@pytest.fixture(scope="module")
def llm(packaged_model: Path) -> compress.LLM:
    return compress.LLM(packaged_model, prefix_cache=False)


def test_each_prompt_has_its_own_parameters(llm: compress.LLM) -> None:
    each = [SamplingParams(max_tokens=5), SamplingParams(max_tokens=9, n=2), SamplingParams(max_tokens=3, logprobs=2)]
    found = llm.generate(PROMPTS, each)
    assert [len(answer.token_ids) for answer in found] == [5, 9, 9, 3]
    assert [answer.logprobs is None for answer in found] == [True, True, True, False]
    for answer, prompt, params in zip(
        found, (PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[2]), [each[0], *each[1:2] * 2, each[2]], strict=True
    ):
        assert answer.token_ids == llm.generate(prompt, params)[0].token_ids
    reference = compress.LLM(llm.runtime.path, kernel="reference").generate(PROMPTS, each)
    assert [answer.token_ids for answer in reference] == [answer.token_ids for answer in found]
    with pytest.raises(UserError, match="3 prompts with 2 sampling params"):
        llm.generate(PROMPTS, each[:2])


def test_priority_decides_who_goes_first(packaged_model: Path) -> None:
    runtime = compress.LLM(packaged_model).runtime
    assert isinstance(runtime, NativeRuntime)
    runtime.engine = engine = Engine(runtime.model.step, runtime.model.pages, most_running=1)
    order: list[int] = []
    step = engine.step

    def watched() -> list:
        grown = step()
        order.extend(request.priority for request in grown if request.finished)
        return grown

    engine.step = watched  # type: ignore[method-assign]
    each = [SamplingParams(max_tokens=4, priority=priority) for priority in (2, 0, 1)]
    answers = runtime.generate(PROMPTS, each)
    assert order == [0, 1, 2]
    plain = runtime.generate(PROMPTS, SamplingParams(max_tokens=4))
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
