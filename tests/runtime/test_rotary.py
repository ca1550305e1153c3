"""Rotary embeddings of every kind that the engine computes: LongRoPE, scaled ones, and those of a part of each head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.runtime import loading, transformers_backend
from compress.runtime.continuations import Continuation
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.paged_model import Chunk
from compress.runtime.protocol import Generation, SamplingParams
from tests.tiny_models import tiny_model, tiny_tokens

FIRST = 16
"""Tokens from which on the tiny LongRoPE model takes the long factors."""


def longrope(part: float) -> dict[str, Any]:
    half = int(16 * part) // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [2.0 + 0.7 * i for i in range(half)],
        "original_max_position_embeddings": FIRST,
        "partial_rotary_factor": part,
    }


def native(path: Path, **settings: Any) -> NativeRuntime:
    runtime = loading.load(path, device="cpu", **settings)
    assert isinstance(runtime, NativeRuntime)
    return runtime


@pytest.fixture(scope="module", params=[1.0, 0.75])
def long_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"rope_parameters": longrope(request.param), "original_max_position_embeddings": FIRST}
    return tiny_model("phi3", tmp_path_factory.mktemp("phi3"), **settings)


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}),
        (
            "llama",
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        ("qwen3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
        ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_scores_are_those_of_transformers(model_type: str, rope: dict[str, Any], tiny: Callable[..., Path]) -> None:
    path = tiny(model_type, rope_parameters={"rope_theta": 10000.0, **rope})
    tokens = tiny_tokens(2, 40)
    found, wanted = native(path).score(tokens), transformers_backend.load(path, device="cpu").score(tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    plain = transformers_backend.load(tiny(model_type), device="cpu").score(tokens)
    assert (plain - wanted).abs().max() > 1e-3


def test_long_sequences_take_the_long_factors(long_model: Path) -> None:
    runtime, reference = native(long_model), transformers_backend.load(long_model, device="cpu")
    for length in (3, FIRST, FIRST + 1, 50):
        tokens = tiny_tokens(2, length)
        torch.testing.assert_close(runtime.score(tokens), reference.score(tokens), rtol=1e-4, atol=2e-5)
    short, long = runtime.score(tiny_tokens(1, 50)[:, :FIRST]), runtime.score(tiny_tokens(1, 50))[:, :FIRST]
    assert (short - long).abs().max() > 1e-3


def test_answers_are_turned_alike_from_beginning_to_end(long_model: Path) -> None:
    """By the length that the longest answer may have: its log-probabilities are the scores of the whole text."""
    runtime, prompts = native(long_model), tiny_tokens(2, 10).tolist()
    params = SamplingParams(max_tokens=6, ignore_end=True, logprobs=0)
    wanted = transformers_backend.load(long_model, device="cpu").generate(prompts, params)
    assert [answer.token_ids for answer in runtime.generate(prompts, params)] == [one.token_ids for one in wanted]
    for tokens in (6, 20):
        together = runtime.generate(prompts, dataclasses.replace(params, max_tokens=tokens))
        for prompt, answer in zip(prompts, together, strict=True):
            whole = torch.tensor([[*prompt, *answer.token_ids]])
            scores = runtime.score(whole)[0, 9:-1].log_softmax(-1)
            expected = scores.gather(1, whole[0, 10:, None]).flatten()
            torch.testing.assert_close(torch.tensor(_logprobs(answer)), expected, rtol=0, atol=1e-6)


def test_short_and_long_share_steps_but_no_pages(long_model: Path) -> None:
    runtime = native(long_model, prefix_cache=True)
    prompt = tiny_tokens(1, 40).tolist()[0]
    model = runtime.model
    tables = [model.pages.take(FIRST), model.pages.take(40)]
    chunks = [Chunk(prompt[:FIRST], 0, tables[0], range(FIRST)), Chunk(prompt, 0, tables[1], range(40), True)]
    alone = [model.step([chunk]) for chunk in chunks]
    assert torch.equal(model.step(chunks), torch.cat(alone))
    parts = [
        model.step([Chunk(prompt[i : i + 7], i, tables[1], range(len(prompt[i : i + 7])), True)])
        for i in range(0, 40, 7)
    ]
    assert torch.equal(torch.cat(parts), alone[1])
    params = SamplingParams(max_tokens=4, ignore_end=True, logprobs=0)
    cold, hit = (runtime.generate([prompt], params)[0] for _ in range(2))
    assert (cold.cached_tokens, hit.cached_tokens) == (0, 32)
    assert _logprobs(cold) == _logprobs(hit)


def test_continuations_do_not_depend_on_each_other(long_model: Path) -> None:
    """Short ones in no row with long ones, though they begin alike."""
    runtime = native(long_model)
    ids = tuple(tiny_tokens(1, 40).tolist()[0])
    requests = [Continuation(ids[:end], end - 2) for end in (FIRST, FIRST + 1, FIRST + 2, 40)]
    together = {}
    for batch in runtime.plan_continuations(requests):
        together |= dict(zip(batch.requests, runtime.score_continuations(batch), strict=True))
    for index, request in enumerate(requests):
        (batch,) = runtime.plan_continuations([request])
        assert runtime.score_continuations(batch) == [together[index]]
        scores = runtime.score(torch.tensor([request.token_ids[:-1]]))[0].log_softmax(-1)
        wanted = sum(
            float(scores[at - 1, request.token_ids[at]]) for at in range(request.start, len(request.token_ids))
        )
        assert together[index].total == pytest.approx(wanted, abs=1e-5)


def _logprobs(answer: Generation) -> list[float]:
    assert answer.logprobs is not None
    return [entry.logprob for entry in answer.logprobs]
