"""The cache of 2 bits: KIVI step by step in torch, and the same bits however tokens come to be in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import compress
from compress.errors import UserError
from compress.models import kv_cache as attentions_of
from compress.runtime import loading, transformers_backend
from compress.runtime.continuations import Continuation
from compress.runtime.drafting.draft_model import DraftModel
from compress.runtime.drafting.speculate import Speculator
from compress.runtime.engine import Engine
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.paged_model import Chunk
from compress.runtime.paged_sequence import PagedSequence
from compress.runtime.pages import PagePool
from compress.runtime.protocol import SamplingParams
from tests.runtime.native import divergence, grouping_does_not_show
from tests.tiny_models import tiny_tokens

PAGE = 32
PROMPTS = ["The king", "Once upon a time there was a little girl who lived in a house by the wood", "A"]


def native(path: Path, kv_cache: str = "int2", **options: bool) -> NativeRuntime:
    runtime = loading.load(path, device="cpu", kernel="cpu", kv_cache=kv_cache, **options)
    assert isinstance(runtime, NativeRuntime)
    return runtime


def upper_half(x: Tensor) -> Tensor:
    """Of the bits of float32 numbers, as float32."""
    return (x.view(torch.int32) >> 16 << 16).view(torch.float32)


def next_bfloat16(x: Tensor) -> Tensor:
    """Its neighbour further from zero."""
    return (x.view(torch.int32) + (1 << 16)).view(torch.float32)


def two_bits(x: Tensor) -> Tensor:
    """Groups of the last dimension on grids from their smallest value to their largest, in bfloat16."""
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low = upper_half(least)
    low = torch.where(low > least, next_bfloat16(low), low)
    exact = (most - low) / 3
    step = upper_half(exact)
    step = torch.where(step < exact, next_bfloat16(step), step)
    code = ((x - low) * torch.where(step > 0, 1 / step, torch.zeros_like(step)) + 0.5).floor().clamp(0, 3)
    return low + code * step


@torch.inference_mode()
def kivi(path: Path, rows: Tensor) -> Tensor:
    """Logits of transformers, token by token, whose cache is rounded whenever its last 32 tokens are full."""
    runtime = transformers_backend.load(path, device="cpu")
    for attention in attentions_of.attentions(runtime.model).values():
        attentions_of.tap(attention, lambda key, value: (key.bfloat16().float(), value.bfloat16().float()))
    cache, found = DynamicCache(config=runtime.model.config), []
    for at in range(rows.shape[1]):
        found.append(runtime.model(rows[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
        if (at + 1) % PAGE:
            continue
        for layer in cache.layers:
            keys, values = layer.keys[:, :, -PAGE:], layer.values[:, :, -PAGE:]
            keys.copy_(two_bits(keys.transpose(-1, -2)).transpose(-1, -2))
            values.copy_(torch.cat([two_bits(group) for group in values.split(32, -1)], -1))
    return torch.cat(found, 1).float()


@pytest.mark.parametrize("heads", ["packaged", 8, 24, 48])
def test_it_is_what_torch_computes_step_by_step(
    heads: str | int, tiny: Callable[..., Path], packaged_model: Path
) -> None:
    path = packaged_model if heads == "packaged" else tiny("qwen3", head_dim=heads, max_position_embeddings=128)
    tokens = tiny_tokens(2, 75)
    found, expected = native(path).score(tokens), kivi(path, tokens)
    lost = divergence(expected, native(path, "bfloat16").score(tokens))
    assert lost > 1e-6
    assert divergence(found, expected) < 0.02 * lost  # a number that lies between two codes may go either way
    assert torch.allclose(found[:, :PAGE], native(path, "bfloat16").score(tokens)[:, :PAGE], atol=1e-5)


@pytest.mark.parametrize("model_type", ["packaged", "gemma2", "gemma3_text"])
def test_no_bit_depends_on_how_tokens_are_grouped(
    model_type: str, tiny: Callable[..., Path], packaged_model: Path
) -> None:
    model = native(packaged_model if model_type == "packaged" else tiny(model_type)).model
    grouping_does_not_show(model, tiny_tokens(3, 100).tolist(), (1, 7, 32, 33, 63, 96))


def test_answers_do_not_depend_on_company_chunks_or_cache(packaged_model: Path) -> None:
    params = SamplingParams(max_tokens=40, logprobs=2, ignore_end=True)
    runtime, cached = native(packaged_model), native(packaged_model, prefix_cache=True)
    long = [" ".join([PROMPTS[1]] * 3 + [prompt]) for prompt in PROMPTS]
    expected = [runtime.generate([prompt], params)[0] for prompt in long]
    small = native(packaged_model)  # chunks of 5 tokens, and room for two of the answers
    pool = PagePool(2 * max(len(runtime.encode(text)) + 41 for text in long) // PAGE, PAGE)
    small.engine = Engine(small.model.step, pool, step_tokens=5)
    cached.generate(long, params)
    again = cached.generate(long, params)
    assert min(answer.cached_tokens for answer in again) >= PAGE
    for found in (runtime.generate(long, params), again, small.generate(long, params)):
        for one, other in zip(found, expected, strict=True):
            assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
    stream = runtime.stream(long[0], params)
    next(stream)
    stream.close()  # leaves a page open
    assert runtime.generate(long[:1], params)[0].token_ids == expected[0].token_ids


def test_what_is_taken_back_is_computed_again(packaged_model: Path) -> None:
    model = native(packaged_model).model
    first, second = tiny_tokens(2, 90).tolist()
    with model.pages.lend(90) as pages, model.pages.lend(90) as others:
        sequence = PagedSequence(model, pages, 90)
        sequence.extend(first)
        for length in (70, 64, 45, 45, 3):  # in the open page, at its beginning, in full ones
            sequence.rewind(length)
            row = first[:length] + second[length:90]
            expected = model.sequence(row, 0, others, range(90))
            assert torch.equal(sequence.extend(second[length:]), expected[length:])
            sequence.rewind(length)
            assert torch.equal(
                sequence.extend(first[length : length + 2]),
                model.sequence(first, 0, others, range(90))[length : length + 2],
            )
            sequence.extend(first[length + 2 :])
        with pytest.raises(ValueError, match="begin a page of int2 anew"):
            model.step([Chunk(first[:1], 40, pages, [0])])


def test_trees_of_continuations_are_scored_as_alone(packaged_model: Path) -> None:
    runtime = native(packaged_model)
    begin, *rest = tiny_tokens(6, 50).tolist()
    requests = [Continuation((*begin[:length], *end), length) for length in (20, 45) for end in rest]
    together = {}
    for batch in runtime.plan_continuations(requests):
        for request, likelihood in zip(batch.requests, runtime.score_continuations(batch), strict=True):
            together[request] = likelihood
    for i, request in enumerate(requests):
        (batch,) = runtime.plan_continuations([request])
        assert together[i] == runtime.score_continuations(batch)[0]


def test_answers_with_a_draft_are_those_without(packaged_model: Path) -> None:
    target, draft = native(packaged_model), loading.load(packaged_model, kernel="cpu-int8", kv_cache="int2")
    assert isinstance(draft, NativeRuntime)
    params = SamplingParams(max_tokens=70, ignore_end=True)
    expected = target.generate(PROMPTS, params)
    found = Speculator(target, DraftModel(draft, target), 6).generate(PROMPTS, params)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]


def test_python_api_and_skipped_layers(packaged_model: Path) -> None:
    llm = compress.LLM(packaged_model, kv_cache="int2", kv_skip="auto")
    assert llm.generate("The king", SamplingParams(max_tokens=40)).pop().token_ids
    with pytest.raises(UserError, match="needs the engine"):
        loading.load(packaged_model, kernel="reference", kv_cache="int2")
