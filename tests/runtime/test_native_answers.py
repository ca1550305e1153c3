"""Answers of the native back end: no bit depends on company, chunks or caches, and streams are the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.models.skeleton import LinearSpec
from compress.runtime import loading, transformers_backend
from compress.runtime.engine import Engine
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.pages import PagePool
from compress.runtime.protocol import SamplingParams
from compress.types import IntScheme
from tests.runtime.native import PROMPTS, grouping_does_not_show, native, tokens_and_logprobs, windows
from tests.runtime.packed import write_packed
from tests.tiny_models import tiny_tokens


@pytest.mark.parametrize("kernel", ["cpu", "cpu-int8"])
def test_no_bit_depends_on_how_tokens_are_grouped(kernel: str, four_bits: tuple[Path, Path]) -> None:
    """Batched equals alone, in parts equals whole, and many threads equal one."""
    model = native(four_bits[0], kernel).model
    grouping_does_not_show(model, windows(native(four_bits[0]), 3, 70).tolist(), (1, 3, 32, 69))
    assert model.pages.free == model.pages.count


@pytest.mark.parametrize("kernel", ["cpu", "cpu-int8"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3", "mixtral"])
def test_families_of_several_schemes_do_not_depend_on_company(
    model_type: str, kernel: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Layers and experts of several widths and groups: right, and the same bits alone, together and in parts."""

    def choose(spec: LinearSpec) -> IntScheme | None:
        if spec.name.endswith("1.self_attn.o_proj"):
            return None
        fused = spec.name.endswith(("qkv_proj", "gate_up_proj"))
        coarse = spec.expert in (1, 3) or (spec.block == 1 and not fused)
        return IntScheme(8, None) if coarse else IntScheme(4, 32)

    packed, dense = write_packed(tiny(model_type), tmp_path, choose)
    runtime = native(packed, kernel)
    model, tokens = runtime.model, tiny_tokens(3, 45)
    if kernel == "cpu":
        expected = transformers_backend.load(dense, device="cpu").score(tokens)
        assert torch.allclose(runtime.score(tokens), expected, atol=2e-5, rtol=1e-4)
    rows = tokens.tolist()
    grouping_does_not_show(model, rows, (7,))
    prompts, params = [row[:40] for row in rows], SamplingParams(max_tokens=8, ignore_end=True, logprobs=2)
    cached = loading.load(packed, kernel=kernel, prefix_cache=True)
    cold, hit = cached.generate(prompts, params), cached.generate(prompts, params)
    assert {answer.cached_tokens for answer in hit} == {32}
    assert (
        tokens_and_logprobs(hit) == tokens_and_logprobs(cold) == tokens_and_logprobs(runtime.generate(prompts, params))
    )


@pytest.mark.parametrize("kernel", ["cpu", "cpu-int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_company_chunks_or_cache(
    kernel: str, temperature: float, four_bits: tuple[Path, Path]
) -> None:
    """Bit for bit: batched and alone, in chunks and whole, prefix found and computed, put back and never."""
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=3, logprobs=3, min_p=0.01)
    runtime = native(four_bits[0], kernel)
    together = tokens_and_logprobs(runtime.generate(PROMPTS, params))
    for index, answer in enumerate(runtime.answers(PROMPTS, params)):
        (alone,) = runtime._finished([answer])
        assert tokens_and_logprobs([alone.generation()]) == together[index : index + 1]

    cached = loading.load(four_bits[0], kernel=kernel, prefix_cache=True)
    long = [f"{PROMPTS[3]} {PROMPTS[1]} {prompt}" * 3 for prompt in PROMPTS]
    expected = runtime.generate(long, params)
    assert tokens_and_logprobs(cached.generate(long, params)) == tokens_and_logprobs(expected)
    again = cached.generate(long, params)
    assert tokens_and_logprobs(again) == tokens_and_logprobs(expected)
    assert min(answer.cached_tokens for answer in again) >= 32
    assert {answer.cached_tokens for answer in runtime.generate(long[:1], params)} == {0}

    small = native(four_bits[0], kernel)  # chunks of 5 tokens, and room for two of the answers
    pool = PagePool(2 * max(len(runtime.encode(text)) + 31 for text in long) // 32, 32)
    small.engine = Engine(small.model.step, pool, step_tokens=5)
    assert tokens_and_logprobs(small.generate(long, params)) == tokens_and_logprobs(expected)
    assert pool.free == pool.count


def test_several_answers_share_their_prompt(tales: NativeRuntime) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, n=3)
    prompt = " ".join(PROMPTS) * 4
    answers = tales.generate([prompt, "A"], params)
    assert len(answers) == 6
    assert len({answer.token_ids for answer in answers[:3]}) == 3
    shared = answers[0].prompt_tokens // 32 * 32
    assert [answer.cached_tokens for answer in answers[:3]] == [0, shared, shared]
    reference = transformers_backend.load(tales.path, device="cpu").generate([prompt, "A"], params)
    assert [answer.token_ids for answer in reference] == [answer.token_ids for answer in answers]


def test_log_probabilities_agree_with_scores(tales: NativeRuntime) -> None:
    (answer,) = tales.generate([[1, 2, 3]], SamplingParams(max_tokens=8, logprobs=1, temperature=0.7))
    scores = tales.score(torch.tensor([[1, 2, 3, *answer.token_ids]]))[0, 2:-1].double().log_softmax(-1)
    assert answer.logprobs is not None
    assert [entry.logprob for entry in answer.logprobs] == [
        float(row[token]) for row, token in zip(scores, answer.token_ids, strict=True)
    ]


def test_a_stream_is_the_answer_in_pieces(tales: NativeRuntime) -> None:
    for params in (SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, stop=("king",), temperature=1.0)):
        (answer,) = tales.generate(["Once upon a time"], params)
        pieces = list(tales.stream("Once upon a time", params))
        assert "".join(pieces) == answer.text
        assert len(pieces) > 1
    assert tales.model.pages.free == tales.model.pages.count


def test_a_stream_goes_on_beside_other_answers(tales: NativeRuntime) -> None:
    params = SamplingParams(max_tokens=20, ignore_end=True)
    (expected,) = tales.generate(["A"], params)
    stream = tales.stream("A", params)
    text = next(stream)
    other = tales.generate([PROMPTS[0]], params)
    assert other[0].token_ids == tales.generate([PROMPTS[0]], params)[0].token_ids
    assert text + "".join(stream) == expected.text
    abandoned = tales.stream("A", params)
    next(abandoned)
    abandoned.close()
    assert not tales.engine.busy
    assert tales.model.pages.free == tales.model.pages.count


def test_answers_of_the_packaged_model(four_bits: tuple[Path, Path]) -> None:
    packed, dense = four_bits
    theirs, exact = transformers_backend.load(dense, device="cpu"), native(packed)
    prompts = ["Once upon a time there was a king", "The dragon said", "In a forest"]
    ours = [answer.text for answer in exact.generate(prompts, SamplingParams(max_tokens=48))]
    assert ours == [answer.text for answer in theirs.generate(prompts, SamplingParams(max_tokens=48))]
