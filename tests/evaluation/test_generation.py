"""Greedy answers: the first differing token, identical shares, loops and silence."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from compress.errors import UserError
from compress.evaluation.generation import compare_generation, first_difference, is_degenerate, repetition
from compress.evaluation.kept_answers import Answering
from compress.runtime.protocol import Generation, SamplingParams
from compress.runtime.transformers_backend import load
from tests.evaluation.fakes import TableRuntime


class Scripted(TableRuntime):
    """Answers each prompt with the tokens it is told to."""

    def __init__(self, **answers: Sequence[int]) -> None:
        super().__init__()
        self.answers = answers
        self.asked: list[SamplingParams] = []

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[Generation]:
        self.asked.append(params)
        return [
            Generation("".join(map(chr, self.answers[p])), tuple(self.answers[p]), "length", 1, 0.1, 0.1)
            for p in prompts
        ]


WORDS = [97 + i for i in range(20)]
LOOP = [97, 98, 99] * 7


def test_answers_are_compared_token_by_token() -> None:
    ours = Scripted(same=WORDS, later=[*WORDS[:5], 65, *WORDS[6:]], shorter=WORDS[:8], loop=LOOP, silent=[])
    theirs = Scripted(same=WORDS, later=WORDS, shorter=WORDS, loop=WORDS, silent=WORDS)
    record = compare_generation(Answering(ours), Answering(theirs), ["same", "later", "shorter", "loop", "silent"], 24)
    assert record.identical_per_prompt == [1, 0, 0, 0, 0]
    assert record.first_difference == [24, 5, 8, 3, 0]
    assert record.degenerate_per_prompt == [0, 0, 0, 1, 0]
    assert (record.prompts, record.max_tokens) == (5, 24)
    assert (record.identical, record.first_difference_mean) == (0.2, 8.0)
    assert (record.degenerate, record.empty) == (0.2, 0.2)
    assert {(p.temperature, p.max_tokens) for p in ours.asked + theirs.asked} == {(0.0, 24)}


def test_alone_only_loops_and_silence_are_counted() -> None:
    record = compare_generation(Answering(Scripted(loop=LOOP, blank=[32, 10])), None, ["loop", "blank"], 24)
    assert (record.degenerate, record.empty) == (0.5, 0.5)
    assert record.identical is record.first_difference is record.first_difference_mean is None


def test_prompts_have_a_hash() -> None:
    model = Scripted(a=WORDS, b=WORDS)
    hashes = {
        compare_generation(Answering(model), None, prompts, 24).prompts_sha256
        for prompts in (["a", "b"], ["b", "a"], "a")
    }
    assert len(hashes) == 3


def test_no_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="no prompts"):
        compare_generation(Answering(Scripted()), None, [], 24)


@pytest.mark.parametrize(
    ("ours", "theirs", "index"),
    [([1, 2, 3], [1, 2, 4], 2), ([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1], 1), ([5], [6], 0)],
)
def test_first_difference(ours: list[int], theirs: list[int], index: int) -> None:
    assert first_difference(ours, theirs) == index


def test_repetition_counts_what_occurred_before() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([7] * 20) == 1 - 1 / 17
    tokens = random.Random(0).choices(range(3), k=60)
    grams = [tuple(tokens[i : i + 4]) for i in range(57)]
    before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition(tokens) == pytest.approx(before / 57)


@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [
        (LOOP, True),
        ([7] * 11, True),
        ([7] * 10, False),
        (WORDS, False),
        (WORDS * 2, False),
        (WORDS * 3, True),
        ([], False),
    ],
)
def test_degenerate_answers(tokens: list[int], verdict: bool) -> None:
    assert is_degenerate(tokens) is verdict


def test_real_models(tiny: Path, rounded: Callable[..., Path]) -> None:
    model, damaged = load(tiny, device="cpu"), load(rounded(tiny, 2), device="cpu")
    prompts = ["Once upon a time", "The king", "a"]
    same = compare_generation(Answering(model), Answering(load(tiny, device="cpu")), prompts, 12)
    assert (same.identical, same.first_difference_mean) == (1.0, 12.0)
    other = compare_generation(Answering(damaged), Answering(model), prompts, 12)
    assert other.identical == 0.0
    assert other.first_difference is not None
    answers = [
        [runtime.generate([p], SamplingParams(max_tokens=12))[0].token_ids for p in prompts]
        for runtime in (damaged, model)
    ]
    for at, ours, theirs in zip(other.first_difference, *answers, strict=True):
        assert ours[:at] == theirs[:at]
        assert ours[: at + 1] != theirs[: at + 1]


def test_kept_answers_are_not_generated_again(tmp_path: Path) -> None:
    model = Scripted(a=WORDS, b=LOOP)
    first = compare_generation(Answering(model, tmp_path, {"m": 1}), None, ["a", "b"], 24)
    again = compare_generation(Answering(model, tmp_path, {"m": 1}), None, ["a", "b"], 24)
    assert again == first
    assert len(model.asked) == 2
    compare_generation(Answering(model, tmp_path, {"m": 2}), None, ["a"], 24)
    compare_generation(Answering(model, tmp_path, {"m": 1}), None, ["a"], 25)
    assert len(model.asked) == 4


@pytest.mark.parametrize(
    "damage", ["", "{", '{"text": "a"}', '{"text": 1, "token_ids": [1]}', '{"text": "a", "token_ids": ["x"]}']
)
def test_damaged_answers_are_generated_again(damage: str, tmp_path: Path) -> None:
    model = Scripted(a=WORDS)
    first = compare_generation(Answering(model, tmp_path), None, ["a"], 24)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(damage)
    assert compare_generation(Answering(model, tmp_path), None, ["a"], 24) == first
    assert len(model.asked) == 2
