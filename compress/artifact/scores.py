"""The figures of an eval.json that lists, cards and comparisons show.

An eval.json is read here as plain data, because the artifact does not know how it was scored. Records of schema 1 hold
one text's `summary` at the top; later ones hold `texts`, `tasks` and `generation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.artifact.manifest import Parent

MUCH_OVERLAP = 0.01
"""Share of a scored text that may be in the calibration text before it is warned about."""


@dataclass(frozen=True, slots=True)
class Score:
    """One measure: its value, and the ends of its confidence interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Accuracy on one task. `flips`: items answered right by one model and wrong by the other; None without a baseline.

    `gates` is False where the accuracy is too near chance to decide anything; `why_not` says so.
    """

    name: str
    items: int
    accuracy: Score
    baseline: Score | None
    flips: int | None
    gates: bool
    why_not: str | None


def reference(parents: Sequence[Parent]) -> Parent:
    """What an artifact is measured against: its parent, or the teacher where it is a student."""
    taught = [parent for parent in parents if parent.stage == "teach"]
    return taught[-1] if taught and parents[-1].stage == "distill" else parents[-1]


def scored_against(record: Mapping[str, Any] | None, parents: Sequence[Parent]) -> str | None:
    """The name of the model that a record compares with where that is neither their `reference` nor the first of
    them, which a run of several stages is measured against; else None.

    What an artifact lost is told against its parent; scores against anything else, itself above all, say nothing of it.
    """
    baseline = (record or {}).get("baseline")
    known = {reference(parents).digest, parents[0].digest}
    if not isinstance(baseline, Mapping) or baseline.get("digest") in known:
        return None
    return str(baseline.get("name"))


def headline_scores(record: Mapping[str, Any] | None) -> dict[str, Score]:
    """The measures of the record's first text, in the record's order; empty without a record or a text.

    A measure is a number, or a mapping with `estimate` and, if it has an interval, `low` and `high`; others are passed
    over.
    """
    found = {name: _score(measure) for name, measure in _first_summary(record or {}).items()}
    return {name: score for name, score in found.items() if score is not None}


def further_texts(record: Mapping[str, Any] | None) -> dict[str, dict[str, Score]]:
    """The measures of the texts after the first, by the text's name."""
    names = {}
    for text in _mappings((record or {}).get("texts"))[1:]:
        data, summary = text.get("data"), text.get("summary")
        if isinstance(data, Mapping) and isinstance(summary, Mapping):
            found = {str(name): _score(measure) for name, measure in summary.items()}
            names[str(data.get("name"))] = {name: score for name, score in found.items() if score is not None}
    return names


def overlaps(record: Mapping[str, Any] | None) -> dict[str, float]:
    """Which share of a text was calibrated on too, by the text's name; only of texts where it is worth a warning."""
    found = {}
    for text in _mappings((record or {}).get("texts")):
        data, share = text.get("data"), text.get("calibration_overlap")
        if isinstance(data, Mapping) and isinstance(share, float) and share > MUCH_OVERLAP:
            found[str(data.get("name"))] = share
    return found


def task_scores(record: Mapping[str, Any] | None) -> list[TaskScore]:
    """The accuracies in an eval record, in the record's order; empty without a record or tasks."""
    scores = []
    for task in _mappings((record or {}).get("tasks")):
        accuracy = _score(task.get("accuracy"))
        correct, baseline = task.get("correct"), task.get("correct_baseline")
        if accuracy is None or not isinstance(correct, list):
            continue
        flips = None
        if isinstance(baseline, list):
            flips = sum(a != b for a, b in zip(correct, baseline, strict=False))
        scores.append(
            TaskScore(
                name=str(task.get("name")),
                items=len(correct),
                accuracy=accuracy,
                baseline=_score(task.get("accuracy_baseline")),
                flips=flips,
                gates=bool(task.get("gates", True)),
                why_not=task.get("why_not"),
            )
        )
    return scores


def generation_scores(record: Mapping[str, Any] | None) -> dict[str, Score]:
    """What the greedy answers show, by the record's names; empty without them."""
    generation = (record or {}).get("generation")
    names = ("identical", "first_difference_mean", "degenerate", "empty")
    if not isinstance(generation, Mapping):
        return {}
    found = {name: _score(generation.get(name)) for name in names}
    return {name: score for name, score in found.items() if score is not None}


def _first_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    summary = record.get("summary")
    for text in _mappings(record.get("texts"))[:1]:
        summary = text.get("summary")
    return {str(name): measure for name, measure in summary.items()} if isinstance(summary, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _score(measure: Any) -> Score | None:
    if _number(measure):
        return Score(float(measure))
    if not isinstance(measure, Mapping) or not _number(measure.get("estimate")):
        return None
    low, high = measure.get("low"), measure.get("high")
    if low is not None and high is not None and _number(low) and _number(high):
        return Score(float(measure["estimate"]), float(low), float(high))
    return Score(float(measure["estimate"]))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
