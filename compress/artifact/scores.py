"""The figures of an eval.json that lists, cards and comparisons show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Score:
    """One measure: its value, and the ends of its confidence interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def headline_scores(record: Mapping[str, Any] | None) -> dict[str, Score]:
    """The measures in an eval record's `summary`, in the record's order; empty without a record or a summary.

    A measure is a mapping with `estimate` and, if it has an interval, `low` and `high`; others are passed over.
    """
    summary = (record or {}).get("summary")
    if not isinstance(summary, Mapping):
        return {}
    found = {str(name): _score(measure) for name, measure in summary.items()}
    return {name: score for name, score in found.items() if score is not None}


def _score(measure: Any) -> Score | None:
    if not isinstance(measure, Mapping) or not _number(measure.get("estimate")):
        return None
    low, high = measure.get("low"), measure.get("high")
    if low is not None and high is not None and _number(low) and _number(high):
        return Score(float(measure["estimate"]), float(low), float(high))
    return Score(float(measure["estimate"]))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
