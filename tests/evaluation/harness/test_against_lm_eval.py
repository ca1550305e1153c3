"""The same items through our runtime and through lm-eval's own `hf` model: equal scores, item by item."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from compress.evaluation.harness import TaskScores, run_tasks
from compress.evaluation.harness.model import RuntimeLM
from compress.evaluation.scoring_kernel import open_runtime
from compress.evaluation.suites import SuiteTask
from compress.evaluation.text import split_documents
from compress.evaluation.together import TOGETHER
from compress.runtime.transformers_backend import load
from tests.evaluation.harness.reference import hf_model, hf_samples, request

RELATIVE = 1e-5
FAST = [
    SuiteTask(name="blimp", items=67),
    SuiteTask(name="hellaswag", items=12),
    SuiteTask(name="lambada_openai", items=12),
    SuiteTask(name="winogrande", items=12),
]
SHIPPED = [("blimp", 670), ("tales_cloze", 200), ("lambada_openai", 100), ("hellaswag", 60), ("openbookqa", 100)]
SHIPPED += [("winogrande", 150), ("wsc", 150)]
WHOLE = [("arc_easy", 60), ("arc_challenge", 60), ("piqa", 60), ("boolq", 25), ("copa", 100), ("mmlu", 57)]
WHOLE += [("truthfulqa_mc1", 40)]


def check(ours: list[TaskScores], theirs: dict[str, list[dict[str, Any]]]) -> float:
    """Equal log-likelihoods, answers and accuracy; returns the worst relative difference."""
    worst = 0.0
    for task in ours:
        samples = theirs[task.name]
        assert len(task.items) == len(samples)
        for item, sample in zip(task.items, samples, strict=True):
            given = [answers[0][0] for answers in sample["resps"]]
            own = item.choice_lls if item.choice_lls is not None else (-(item.nll or math.nan),)
            assert len(own) == len(given)
            worst = max(worst, *(abs(a - b) / abs(b) for a, b in zip(own, given, strict=True)))
            assert item.correct == int(sample[task.metric])
        mean = sum(int(sample[task.metric]) for sample in samples) / len(samples)
        assert task.accuracy == mean == pytest.approx(task.metrics[task.metric])
    assert worst <= RELATIVE
    return worst


def test_per_item_scores_are_those_of_lm_eval(packaged_model: Path) -> None:
    ours = run_tasks(load(packaged_model, device="cpu"), FAST)
    worst = check(ours, hf_samples(hf_model(packaged_model), FAST))
    assert worst > 0.0  # two computations, not one
    assert [task.kind for task in ours] == ["multiple_choice", "multiple_choice", "loglikelihood", "multiple_choice"]
    assert [len(task.items) for task in ours] == [67, 12, 12, 12]


def test_a_begin_token_of_the_tokenizer_s_own(shared: Path) -> None:
    path = shared / "models" / "stories260K"
    tasks = [SuiteTask(name="blimp", items=30), SuiteTask(name="openbookqa", items=10)]
    check(run_tasks(load(path, device="cpu"), tasks), hf_samples(hf_model(path), tasks))


def test_a_context_that_is_too_long_is_cut_on_the_left(tiny: Path) -> None:
    """The tiny model has 64 positions and reads bytes: every context of these tasks is longer."""
    tasks = [SuiteTask(name="winogrande", items=8), SuiteTask(name="lambada_openai", items=8)]
    check(run_tasks(load(tiny, device="cpu"), tasks), hf_samples(hf_model(tiny), tasks))


def rolling(path: Path, documents: list[str]) -> tuple[list[float], list[float]]:
    requests = [request("loglikelihood_rolling", document) for document in documents]
    ours = RuntimeLM(load(path, device="cpu")).loglikelihood_rolling(requests)
    return ours, hf_model(path).loglikelihood_rolling(requests, disable_tqdm=True)


def wikitext(shared: Path) -> list[str]:
    text = (shared / "data" / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8")
    documents = split_documents(text, empty_lines=False)
    assert len(documents) == 62
    return documents


def test_rolling_perplexity_on_wikitext(packaged_model: Path, shared: Path) -> None:
    documents = [document[:2500] for document in wikitext(shared)[:4]]
    ours, theirs = rolling(packaged_model, documents)
    assert ours == pytest.approx(theirs, rel=RELATIVE)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_greedy_answers_are_those_of_lm_eval(kernel: str, packaged_model: Path) -> None:
    settings = {"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False}
    contexts = ["Once upon a time there was", "The king said to his daughter,", "She opened the door and"]
    requests = [request("generate_until", context, dict(settings)) for context in contexts]
    ours = RuntimeLM(open_runtime(packaged_model, "cpu", "auto", kernel)).generate_until(requests)
    assert ours == hf_model(packaged_model, 1).generate_until(requests, disable_tqdm=True)
    assert any(ours)


def test_answers_are_given_together_where_that_changes_none(
    packaged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    drawn = {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    contexts = [f"Once upon a time there were {count} " for count in range(TOGETHER + 3)]
    requests = [request("generate_until", context, dict(greedy)) for context in contexts]
    requests += [request("generate_until", context, dict(drawn)) for context in contexts[:3]]
    runtime = open_runtime(packaged_model, "cpu", "auto", "cpu")
    asked: list[int] = []
    generate = runtime.generate
    monkeypatch.setattr(
        runtime, "generate", lambda prompts, params: asked.append(len(prompts)) or generate(prompts, params)
    )
    together = RuntimeLM(runtime).generate_until(requests)
    assert asked == [TOGETHER, 3, 1, 1, 1]
    asked.clear()
    monkeypatch.setattr(runtime, "deterministic", False)
    assert RuntimeLM(runtime).generate_until(requests) == together
    assert asked == [1] * len(requests)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tales-6m", "stories260K"])
def test_scores_on_everything_that_ships(name: str, shared: Path) -> None:
    path = shared / "models" / name
    tasks = [SuiteTask(name=task, items=items) for task, items in SHIPPED]
    check(run_tasks(load(path, device="cpu"), tasks), hf_samples(hf_model(path), tasks))


@pytest.mark.slow
def test_scores_on_the_tasks_of_the_data_directory(packaged_model: Path, shared: Path) -> None:
    tasks = [SuiteTask(name=task, items=items) for task, items in WHOLE]
    check(run_tasks(load(packaged_model, device="cpu"), tasks), hf_samples(hf_model(packaged_model), tasks))


@pytest.mark.slow
def test_rolling_perplexity_on_all_of_wikitext(packaged_model: Path, shared: Path) -> None:
    documents = wikitext(shared)
    ours, theirs = rolling(packaged_model, documents)
    assert ours == pytest.approx(theirs, rel=RELATIVE)
    words = sum(len(document.split()) for document in documents)
    assert math.exp(-sum(ours) / words) == pytest.approx(math.exp(-sum(theirs) / words), rel=RELATIVE)
