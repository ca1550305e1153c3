"""Prompts of one call with parameters of their own: what they change, their order, and what they share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import compress
from compress.errors import UserError, WorkError
from compress.runtime import loading
from compress.runtime.engine import Engine
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.paged_model import Chunk
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


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "no prompt"),
        (5, "no prompt"),
        ([None], "no prompt"),
        ([[1, "a"]], "no prompt"),
        ([[]], "empty"),
        ([[1, 2**70]], "outside the vocabulary"),
        ([[1, -1]], "outside the vocabulary"),
        ("a \ud800", "surrogate pair at character 2"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any, said: str, llm: compress.LLM) -> None:
    for ask in (llm.generate, llm.score):
        with pytest.raises(UserError, match=said):
            ask(prompt)


def test_ids_may_come_in_any_sequence(llm: compress.LLM) -> None:
    params = SamplingParams(max_tokens=3)
    expected = llm.generate([5, 6, 7], params)[0].token_ids
    for ids in (np.array([5, 6, 7]), torch.tensor([5, 6, 7]), range(5, 8), [np.int64(5), 6, 7], np.array([[5, 6, 7]])):
        assert [answer.token_ids for answer in llm.generate(ids, params)] == [expected]
    assert llm.generate([], []) == []
    with pytest.raises(UserError, match="1 prompts with 0"):
        llm.generate("A", [])


def test_a_tokenizer_larger_than_the_model_is_told(
    tiny: Callable[..., Path], packaged_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(packaged_model / name, model / name)
    for kernel in ("auto", "reference"):
        runtime = loading.load(model, device="cpu", kernel=kernel)
        assert len(runtime.tokenizer) > runtime.vocab_size
        with pytest.raises(UserError, match="outside the vocabulary"):
            runtime.generate(["The king was unhappy yesterday"], SamplingParams())
    small = loading.load(model, device="cpu", kv_cache="int8", kv_skip="auto")  # measured on what it has
    assert small.cache.kl is not None


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "x", 10**12, 2**63])
def test_room_that_no_cache_has_is_refused(wrong: Any, packaged_model: Path) -> None:
    with pytest.raises(UserError, match="cache_tokens is"):
        loading.load(packaged_model, cache_tokens=wrong)


def test_a_cache_too_small_to_be_measured_is_told(packaged_model: Path) -> None:
    with pytest.raises(UserError, match="measuring takes 256 tokens") as refused:
        loading.load(packaged_model, device="cpu", cache_tokens=32, kv_cache="int8", kv_skip="auto")
    assert refused.value.hint == "give a larger cache_tokens"
    for skip in (None, "9" * 5000, "99"):
        with pytest.raises(UserError, match="layers that are not there"):
            loading.load(packaged_model, device="cpu", kv_cache="int8", kv_skip=skip)  # type: ignore[arg-type]


def test_a_failed_request_leaves_others_alone(packaged_model: Path) -> None:
    runtime = loading.load(packaged_model, device="cpu", cache_tokens=512, prefix_cache=True)
    assert isinstance(runtime, NativeRuntime)
    params = SamplingParams(max_tokens=12, ignore_end=True)
    expected = [answer.text for answer in runtime.generate(PROMPTS[:2], params)]
    stream = runtime.stream(PROMPTS[0], params)
    text = next(stream)
    step = runtime.engine._step

    def broken(chunks: Sequence[Chunk]) -> Tensor:
        logits = step(chunks)
        logits[-1, 3] = torch.nan  # of the request that came last
        return logits

    runtime.engine._step = broken
    with pytest.raises(WorkError, match="not finite"):
        runtime.generate(PROMPTS[1:2], params)
    runtime.engine._step = step
    assert text + "".join(stream) == expected[0]
    assert runtime.generate(PROMPTS[1:2], params)[0].text == expected[1]

    stream, other = (runtime.stream(prompt, params) for prompt in PROMPTS[:2])
    next(stream), next(other)
    runtime.engine._step = broken
    text = next(stream)  # a step in which the other one fails
    runtime.engine._step = step
    with pytest.raises(WorkError, match="not finite"):
        list(other)
    stream.close()
    assert not runtime.engine.busy
    assert runtime.model.pages.free == runtime.model.pages.count


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
