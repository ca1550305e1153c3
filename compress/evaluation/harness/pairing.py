"""From the scores of one or two models to the record of a task, and whether the task may gate. Free of torch.

A task says something about a loss only where the baseline does better than guessing: otherwise a ruined model scores
the same. So a task gates only where the baseline is more than 5 standard errors above chance.
"""

from __future__ import annotations

from collections.abc import Sequence

from compress.errors import IntegrityError, WorkError
from compress.evaluation.harness.scores import TaskScores
from compress.evaluation.record_base import IntervalRecord
from compress.evaluation.record_parts import TaskRecord
from compress.evaluation.statistics import LEVEL, Interval, by_cluster, hull, ratio, wilson
from compress.evaluation.statistics.accuracy import errors_above_chance

STANDARD_ERRORS = 5.0


def pair(candidate: TaskScores, baseline: TaskScores | None) -> TaskRecord:
    """The record of a task; alone, `gates` is decided by the model itself.

    Raises:
        IntegrityError: the two were not asked the same questions of the same data in the same words.
        WorkError: no items.
    """
    if not candidate.items:
        raise WorkError(f"the task {candidate.name} has no items", "choose more items")
    if baseline is not None:
        _check_comparable(candidate, baseline)
    clusters = candidate.clusters
    judge = candidate if baseline is None else baseline
    why_not = reason_not_to_gate(judge, "the model" if baseline is None else "the baseline")
    return TaskRecord(
        name=candidate.name,
        kind=candidate.kind,
        metric=candidate.metric,
        data_sha256=candidate.data_sha256,
        config_sha256=candidate.config_sha256,
        prompts_sha256=candidate.prompts_sha256,
        item_ids=candidate.item_ids,
        correct=candidate.correct,
        correct_baseline=None if baseline is None else baseline.correct,
        chance=candidate.chance,
        clusters=None if clusters is None else list(clusters),
        answers_sha256=candidate.answers_sha256,
        answers_baseline_sha256=None if baseline is None else baseline.answers_sha256,
        accuracy=IntervalRecord.of(accuracy_interval(candidate.correct, clusters)),
        accuracy_baseline=None
        if baseline is None
        else IntervalRecord.of(accuracy_interval(baseline.correct, clusters)),
        metrics=dict(candidate.metrics),
        gates=why_not is None,
        why_not=why_not,
    )


def accuracy_interval(correct: Sequence[int], clusters: Sequence[str] | None, level: float = LEVEL) -> Interval:
    """Interval of an accuracy: Wilson's, or where there are at least two clusters the outer bounds of Wilson's and of
    the ratio estimator over clusters.

    Items of a cluster are alike, so that taking them for independent gives too narrow an interval; and where all
    clusters score the same, the ratio estimator alone would see no uncertainty at all.
    """
    alone = wilson(sum(correct), len(correct), level)
    if clusters is None or len(set(clusters)) < 2:
        return alone
    found = hull(alone, ratio(*by_cluster(correct, clusters), level))
    return Interval(found.estimate, max(0.0, found.low), min(1.0, found.high), level)


def reason_not_to_gate(scores: TaskScores, who: str) -> str | None:
    """Why a task cannot gate, in words; None where `who` is more than 5 standard errors above chance.

    The standard error is that of these items, not of others like them: the question is whether there is anything here
    to lose.
    """
    above = errors_above_chance(sum(scores.correct), len(scores.items), scores.chance)
    if above > STANDARD_ERRORS:
        return None
    return (
        f"{who} scores {100 * scores.accuracy:.1f}% where guessing scores {100 * scores.chance:.1f}%: "
        f"{above:.1f} standard errors above chance, and a gate needs more than {STANDARD_ERRORS:g}"
    )


def _check_comparable(candidate: TaskScores, baseline: TaskScores) -> None:
    for what, ours, theirs in (
        ("names", candidate.name, baseline.name),
        ("metrics", (candidate.kind, candidate.metric), (baseline.kind, baseline.metric)),
        ("definitions", candidate.config_sha256, baseline.config_sha256),
        ("items", candidate.item_ids, baseline.item_ids),
        ("data", candidate.data_sha256, baseline.data_sha256),
        ("prompts", candidate.prompts_sha256, baseline.prompts_sha256),
        ("clusters", candidate.clusters, baseline.clusters),
    ):
        if ours != theirs:
            raise IntegrityError(
                f"the scores on {candidate.name} and {baseline.name} cannot be compared: their {what} differ",
                "score both models with the same suite and the same version of compress",
            )
