"""Scores as lists and cards show them: from records with several texts, tasks and answers, and from older ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.artifact.attach import attach_eval
from compress.artifact.reader import Artifact
from compress.artifact.scores import (
    Score,
    TaskScore,
    further_texts,
    generation_scores,
    headline_scores,
    scored_against,
    task_scores,
)
from compress.artifact.verify import verify


def measure(value: float) -> dict[str, float]:
    return {"estimate": value, "low": value - 1, "high": value + 1, "level": 0.95}


RECORD: dict[str, Any] = {
    "texts": [
        {
            "data": {"name": "tales", "tokens": 5110},
            "summary": {"kl_mean": measure(2.0), "dp_rms": 0.25, "kl_percentiles": {"p50": 0.1}, "dp_mean": None},
        },
        {"data": {"name": "wiki", "tokens": 99}, "summary": {"kl_mean": measure(7.0)}},
    ],
    "tasks": [
        {
            "name": "cloze",
            "correct": [1, 0, 1, 1],
            "correct_baseline": [1, 1, 0, 1],
            "accuracy": measure(0.75),
            "accuracy_baseline": measure(0.75),
            "gates": True,
            "why_not": None,
        },
        {
            "name": "blimp",
            "correct": [1, 0],
            "correct_baseline": None,
            "accuracy": measure(0.5),
            "accuracy_baseline": None,
            "gates": False,
            "why_not": "too | near chance",
        },
    ],
    "generation": {"identical": 0.5, "first_difference_mean": 7.5, "degenerate": 0.0, "empty": 0.0, "prompts": 2},
}


def test_what_a_record_shows() -> None:
    assert headline_scores(RECORD) == {"kl_mean": Score(2.0, 1.0, 3.0), "dp_rms": Score(0.25)}
    assert further_texts(RECORD) == {"wiki": {"kl_mean": Score(7.0, 6.0, 8.0)}}
    assert task_scores(RECORD) == [
        TaskScore("cloze", 4, Score(0.75, -0.25, 1.75), Score(0.75, -0.25, 1.75), 2, True, None),
        TaskScore("blimp", 2, Score(0.5, -0.5, 1.5), None, None, False, "too | near chance"),
    ]
    assert generation_scores(RECORD) == {
        "identical": Score(0.5),
        "first_difference_mean": Score(7.5),
        "degenerate": Score(0.0),
        "empty": Score(0.0),
    }


def test_scores_against_another_model_than_the_parent_name_it(finished: Path) -> None:
    parents = Artifact.open(finished).manifest.parents
    honest = {**RECORD, "baseline": {"name": "what it was", "digest": parents[-1].digest}}
    other = {**RECORD, "baseline": {"name": "it|self", "digest": "f" * 64}}
    assert scored_against(honest, parents) is scored_against(RECORD, parents) is scored_against(None, parents) is None
    assert scored_against(other, parents) == "it|self"
    attach_eval(finished, other)
    assert "Scored against it\\|self, not against the parent" in (finished / "README.md").read_text()
    attach_eval(finished, honest)
    assert "Scored against" not in (finished / "README.md").read_text()


@pytest.mark.parametrize(
    "record", [None, {}, {"texts": [], "tasks": [], "generation": None}, {"texts": 3, "tasks": "x"}]
)
def test_what_is_not_there_is_not_shown(record: dict[str, Any] | None) -> None:
    assert headline_scores(record) == further_texts(record) == generation_scores(record) == {}
    assert task_scores(record) == []


def test_the_card_shows_texts_tasks_and_answers(finished: Path) -> None:
    attach_eval(finished, RECORD)
    card = (finished / "README.md").read_text()
    for fact in (
        "On 5110 tokens of `tales`:",
        "| kl_mean | 2 | 1 to 3 |",
        "| dp_rms | 0.25 | - |",
        "On `wiki`:",
        "| kl_mean | 7 | 6 to 8 |",
        "On `greedy answers`:",
        "| identical | 0.5 | - |",
        "| cloze | 4 | 75.0% | 75.0% | 50.0% |  |",
        "| blimp | 2 | - | 50.0% | - | too \\| near chance |",
        "The full record is `eval.json`.",
    ):
        assert fact in card, card
    assert "\n\n\n" not in card


def test_tasks_alone_are_shown(finished: Path) -> None:
    attach_eval(finished, {**RECORD, "texts": []})
    card = (finished / "README.md").read_text()
    assert "| cloze | 4 |" in card
    assert "tokens of" not in card.split("## What it lost")[1].split("Relative output error")[0]


def test_bytes_are_attached_as_they_are(finished: Path) -> None:
    data = b'{"texts": [],\n "summary": {}}\n'
    attach_eval(finished, data)
    assert (finished / "eval.json").read_bytes() == data
    assert verify(finished).ok


def test_samples_of_earlier_scores_are_dropped(finished: Path) -> None:
    attach_eval(finished, RECORD, samples=b"old")
    after = attach_eval(finished, RECORD)
    assert "samples.jsonl.gz" not in after.manifest.attachments
    assert not (finished / "samples.jsonl.gz").exists()
    assert verify(finished).ok
    again = attach_eval(finished, RECORD, samples=b"new")
    assert again.attachment("samples.jsonl.gz") == b"new"
    assert Artifact.open(finished).artifact_id == after.artifact_id
