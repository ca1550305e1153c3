"""The next-token filters against their definitions."""

from __future__ import annotations

import re

import pytest
import torch

from compress.errors import UserError, WorkError
from compress.kernels import dispatch
from compress.runtime.protocol import SamplingParams
from compress.runtime.sampling import Sampler, choose_all, distribution, seeded

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.9, 0.0, -4.0])


def defined(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The same by sorting everything, in float64."""
    order = logits.sort(descending=True, stable=True).indices
    left = (logits.double() / params.temperature)[order]
    if params.top_k:
        left[params.top_k :] = float("-inf")
    probabilities = left.softmax(0)
    if params.top_p < 1.0:
        probabilities[probabilities.cumsum(0) - probabilities >= params.top_p] = 0.0
    probabilities[probabilities < params.min_p * probabilities.max()] = 0.0
    return torch.zeros_like(probabilities).index_copy(0, order, probabilities / probabilities.sum())


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 40.0])
@pytest.mark.parametrize("vocab", [1, 7, 64, 5000])
def test_filters_are_those_of_a_full_sort(vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = spread * torch.randn(vocab, generator=generator)
    logits[::3] = logits[0]  # ties, of which the lower ids stay
    for top_k in (0, 1, 5, 700):
        for top_p in (1.0, 0.9707, 0.3103):  # no whole number of equal tokens
            for min_p in (0.0, 0.05):
                params = SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
                torch.testing.assert_close(distribution(logits, params), defined(logits, params), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_a_finite_best_is_refused_by_the_kernel(value: float) -> None:
    with pytest.raises(ValueError, match="logits must be"):
        dispatch.native().keep_tokens(torch.full((3,), value), 1.0, 0, 1.0, 0.0)


def draws(params: SamplingParams, count: int = 4000) -> torch.Tensor:
    sampler = Sampler(params, 0, ())
    found = torch.tensor([sampler.choose(LOGITS) for _ in range(count)])
    return torch.bincount(found, minlength=len(LOGITS)) / count


def test_greedy_takes_the_first_of_equals() -> None:
    params = SamplingParams()
    assert choose_all(torch.tensor([[1.0, 3.0, 3.0]]), [Sampler(params, 0, ())]) == [1]
    logged = Sampler(SamplingParams(logprobs=0), 0, ())
    assert choose_all(torch.tensor([[1.0, 3.0, 3.0]]), [logged]) == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    shares = draws(SamplingParams(temperature=temperature))
    torch.testing.assert_close(shares, (LOGITS / temperature).softmax(0), atol=0.03, rtol=0)


def test_top_k_keeps_the_k_likeliest() -> None:
    probabilities = distribution(LOGITS, SamplingParams(temperature=1.0, top_k=2))
    expected = LOGITS[[1, 3]].double().softmax(0)
    assert torch.equal(probabilities.nonzero().flatten(), torch.tensor([1, 3]))
    torch.testing.assert_close(probabilities[[1, 3]], expected)


def test_top_k_beyond_the_vocabulary_changes_nothing() -> None:
    torch.testing.assert_close(
        distribution(LOGITS, SamplingParams(temperature=1.0, top_k=99)), LOGITS.double().softmax(0)
    )


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = LOGITS.softmax(0)
    ordered = probabilities.sort(descending=True).values
    for count in range(1, len(LOGITS) + 1):
        share = float(ordered[:count].sum()) - 1e-4
        kept = distribution(LOGITS, SamplingParams(temperature=1.0, top_p=share))
        assert int((kept > 0).sum()) == count
        assert float(kept.sum()) == pytest.approx(1.0)
        assert set(kept.nonzero().flatten().tolist()) == set(probabilities.topk(count).indices.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_stop_the_work(value: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    with pytest.raises(WorkError):
        choose_all(torch.tensor([[0.0, value]]), [Sampler(params, 0, ())])


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"max_tokens": 1.5},
        {"temperature": 1e-50},
        {"temperature": "hot"},
        {"top_k": 10**20},
        {"seed": 2**63},
        {"n": 10**9},
        {"logprobs": 0.5},
        {"stop": ("",)},
        {"stop": (1,)},
        {"stop": 1},
        {"priority": None},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=re.escape(f"{name} is {value!r}")):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_a_single_stop_or_a_list_counts_as_a_tuple() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_seeds_that_follow_each_other_give_answers_of_their_own() -> None:
    numbers = [(seed, index) for seed in range(8) for index in range(8)]
    found = {seeded(SamplingParams(seed=seed), index).initial_seed() for seed, index in numbers}
    assert len(found) == len(numbers)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.95, 1.0])
def test_min_p_keeps_tokens_close_to_the_likeliest(share: float) -> None:
    probabilities = LOGITS.double().softmax(0)
    kept = distribution(LOGITS, SamplingParams(temperature=1.0, min_p=share))
    expected = probabilities * (probabilities >= share * probabilities.max())
    torch.testing.assert_close(kept, expected / expected.sum())


def test_repetition_is_penalised_in_prompt_and_answer() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    sampler = Sampler(params, 0, [0])
    assert sampler.choose(logits) == 1  # 2.0 / 2 < 1.5
    assert sampler.choose(logits) == 0  # 2.0 / 2 > 1.5 / 2
    assert Sampler(params, 0, [2]).choose(torch.tensor([-9.0, -9.0, -1.0, -1.5])) == 3  # -1 * 2 < -1.5


def test_presence_counts_once_and_frequency_every_time() -> None:
    logits = torch.tensor([1.0, 0.0])
    present = Sampler(SamplingParams(presence_penalty=0.8), 0, [0])  # the prompt does not count
    assert [present.choose(logits) for _ in range(3)] == [0, 0, 0]
    often = Sampler(SamplingParams(frequency_penalty=0.4), 0, [])
    assert [often.choose(logits) for _ in range(4)] == [0, 0, 0, 1]


def test_log_probabilities_are_those_of_the_model() -> None:
    params = SamplingParams(temperature=0.5, top_k=1, presence_penalty=1.0, logprobs=2)
    sampler = Sampler(params, 0, ())
    sampler.choose(LOGITS)
    (entry,) = sampler.logprobs
    expected = LOGITS.double().log_softmax(0)
    assert entry.token_id == 1
    assert entry.logprob == float(expected[1])
    assert entry.top == ((1, float(expected[1])), (3, float(expected[3])))
