"""Decoding with a draft: the answers of the target alone, and its distribution where tokens are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

import pytest
import torch

from compress.content import default_model
from compress.errors import IntegrityError, UserError
from compress.evaluation.suites import packaged_prompts
from compress.runtime.drafting.draft_model import DraftModel, Proposal, fitted
from compress.runtime.drafting.speculate import Speculator
from compress.runtime.loading import load as load_runtime
from compress.runtime.protocol import SamplingParams
from compress.runtime.sampling import Sampler, distribution
from compress.runtime.text_model import TextModel
from tests.tiny_models import tiny_model


def load(path: Path, kernel: str = "auto") -> TextModel:
    return cast(TextModel, load_runtime(path, kernel=kernel))


class Scripted:
    """A draft that proposes what it is told, right for a while and then wrong, and counts how often it is asked."""

    name = "scripted"

    def __init__(self, truth: list[int], wrong_every: int) -> None:
        self.truth, self.wrong_every, self.asked = truth, wrong_every, 0

    def begun(self, room: int) -> AbstractContextManager[Scripted]:
        return nullcontext(self)

    def propose(self, ids: Sequence[int], count: int, sampler: Sampler) -> Proposal:
        self.asked += 1
        ahead = self.truth[len(ids) : len(ids) + count]
        return Proposal(tuple(t if (len(ids) + i) % self.wrong_every else t ^ 1 for i, t in enumerate(ahead)), None)


@pytest.mark.parametrize("kernel", ["cpu", "cpu-int8", "reference"])
def test_greedy_answers_are_those_of_the_target_alone(kernel: str) -> None:
    target = load(default_model(), kernel=kernel)
    params = SamplingParams(max_tokens=20)
    prompts = packaged_prompts(2)
    plain = target.generate(prompts, params)
    draft = DraftModel(load(default_model(), kernel="cpu-int8"), target)
    found = Speculator(target, draft, 4).generate(prompts, params)
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]
    assert [each.finish_reason for each in found] == [each.finish_reason for each in plain]
    for each in found:
        said = each.speculation
        assert said is not None
        assert said.accepted == sum(said.accepted_at) <= said.proposed
        assert len(each.token_ids) + (each.finish_reason == "stop") <= 1 + said.steps + said.accepted
    same = Speculator(target, DraftModel(target, target), 4).generate(prompts[:1], params)[0].speculation
    assert same is not None
    assert same.accepted == same.proposed, "a model agrees with itself"
    assert same.tokens_per_step > 3


def test_any_draft_gives_the_same_answer_and_only_its_worth_differs() -> None:
    target = load(default_model())
    prompt = target.encode("The old king had three sons, and the youngest")
    params = SamplingParams(max_tokens=30, logprobs=2, repetition_penalty=1.2)
    (plain,) = target.generate([prompt], params)
    for wrong_every in (1, 3, 1000):
        draft = Scripted([*prompt, *plain.token_ids, 0, 0, 0, 0, 0, 0], wrong_every)
        (found,) = Speculator(target, draft, 5).generate([prompt], params)
        assert found.token_ids == plain.token_ids
        assert found.logprobs == plain.logprobs, "those of the target, whoever proposed the token"
        assert found.speculation is not None
        assert found.speculation.steps == draft.asked
        assert found.speculation.accepted == (0 if wrong_every == 1 else found.speculation.accepted)
    assert found.speculation.steps == 5, "29 tokens behind the first, six in a step"


def test_what_is_drawn_with_a_draft_has_the_distribution_of_the_target() -> None:
    params = SamplingParams(temperature=0.8, top_k=5, seed=3)
    generator = torch.Generator().manual_seed(5)
    target, drafted = torch.randn(2, 8, generator=generator) * 1.5
    sampler, count = Sampler(params, 0, []), 6_000
    expected = distribution(target, params)
    seen: Counter[int] = Counter()
    for _ in range(count):
        token, q = sampler.draft(drafted)
        assert q is not None
        seen[sampler.judge(target, token, q)[0]] += 1
    drawn = torch.tensor([seen[token] for token in range(8)], dtype=torch.float64)
    assert bool((drawn[expected == 0] == 0).all())
    possible = expected > 0
    statistic = float(((drawn - count * expected)[possible] ** 2 / (count * expected)[possible]).sum())
    assert statistic < 18.5, "chi-square with 4 degrees of freedom: one in a thousand is larger than 18.47"
    agreed = float(torch.minimum(expected, distribution(drafted, params)).sum())
    accepted = sum(sampler.judge(target, *sampler.draft(drafted))[1] for _ in range(2000)) / 2000
    assert abs(accepted - agreed) < 0.04, "accepted as often as the two distributions overlap"


def test_drawn_pairs_of_tokens_have_the_distribution_of_the_target(tmp_path: Path) -> None:
    target = load(tiny_model("llama", tmp_path / "target"))
    draft = load(tiny_model("llama", tmp_path / "draft", seed=9, num_hidden_layers=1))
    params = SamplingParams(max_tokens=2, temperature=1.0, top_k=2, n=600, ignore_end=True)
    prompt = [5, 3, 7]
    first = distribution(target.score(torch.tensor([prompt]))[0, -1], params)
    expected = {}
    for a in first.nonzero()[:, 0].tolist():
        second = distribution(target.score(torch.tensor([[*prompt, a]]))[0, -1], params)
        expected |= {(a, b): float(first[a] * second[b]) for b in second.nonzero()[:, 0].tolist()}
    found = Speculator(target, DraftModel(draft, target), 3).generate([prompt], params)
    seen = Counter(tuple(each.token_ids) for each in found)
    assert set(seen) <= set(expected)
    statistic = sum((seen[pair] - 600 * p) ** 2 / (600 * p) for pair, p in expected.items())
    assert statistic < 16.3, "chi-square with 3 degrees of freedom: one in a thousand is larger than 16.27"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_families_contexts_and_vocabularies(family: str, tmp_path: Path) -> None:
    target = load(tiny_model(family, tmp_path / "target"))
    draft = load(tiny_model("llama", tmp_path / "draft", seed=4))
    limit = target.context_length or 64
    params = SamplingParams(max_tokens=2 * limit, ignore_end=True)
    (plain,) = target.generate([[5, 3, 7, 9]], params)
    (found,) = Speculator(target, DraftModel(draft, target), 6).generate([[5, 3, 7, 9]], params)
    assert (found.token_ids, found.finish_reason) == (plain.token_ids, plain.finish_reason)


def test_rows_of_another_vocabulary() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert fitted(logits, 2).tolist() == [1.0, 2.0]
    assert distribution(fitted(logits, 5), SamplingParams(temperature=1.0)).tolist()[3:] == [0.0, 0.0]


def test_what_cannot_draft_is_refused(tiny: Callable[..., Path]) -> None:
    target = load(default_model())
    with pytest.raises(UserError, match="17 draft tokens"):
        Speculator(target, DraftModel(target, target), 17)
    with pytest.raises(IntegrityError, match="different tokenizers"):
        DraftModel(load(tiny("llama")), target)
