"""From scores to a record: what may gate, what may be compared, and whose accuracy it is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from compress.errors import IntegrityError, WorkError
from compress.evaluation.harness import TaskScores, pair
from compress.evaluation.harness.pairing import accuracy_interval
from compress.evaluation.record_parts import TaskRecord
from tests.evaluation.harness.helpers import scores, with_item

GOOD = [1] * 90 + [0] * 10
BASE = [1] * 95 + [0] * 5


def test_a_record_of_two_models() -> None:
    record = pair(scores(GOOD), scores(BASE))
    assert record == TaskRecord.model_validate_json(record.model_dump_json())
    assert (record.correct, record.correct_baseline) == (GOOD, BASE)
    assert record.accuracy.estimate == 0.9
    assert record.accuracy_baseline is not None
    assert record.accuracy_baseline.estimate == 0.95
    expected = stats.binomtest(90, 100).proportion_ci(0.95, method="wilson")
    assert (record.accuracy.low, record.accuracy.high) == pytest.approx((expected.low, expected.high))
    assert (record.gates, record.why_not) == (True, None)
    assert record.metrics == {"acc": 0.9}


def test_a_record_of_one_model() -> None:
    record = pair(scores(GOOD), None)
    assert record.correct_baseline is record.accuracy_baseline is record.answers_baseline_sha256 is None
    assert record.gates


@pytest.mark.parametrize(
    ("right", "count", "chance", "gates"),
    [
        (76, 100, 0.5, True),  # 5.2 errors of guessing
        (74, 100, 0.5, False),  # 4.8
        (50, 100, 0.5, False),
        (10, 100, 0.5, False),
        (40, 100, 0.25, False),
        (55, 100, 0.25, True),
        (1, 1, 0.5, False),  # one item shows nothing, however right
        (20, 1000, 0.0, False),
        (40, 1000, 0.0, True),
        (0, 1000, 0.0, False),
    ],
)
def test_a_task_gates_only_above_chance(right: int, count: int, chance: float, gates: bool) -> None:
    baseline = scores([1] * right + [0] * (count - right), chance=chance)
    perfect = scores([1] * count, chance=chance)
    record = pair(perfect, baseline)
    share, smooth = right / count, (right + 2) / (count + 4)
    error = math.sqrt(max(chance * (1 - chance) / count, smooth * (1 - smooth) / (count + 4)))
    assert record.gates is gates is ((share - chance) / error > 5.0)
    if not gates:
        assert record.why_not is not None
        assert record.why_not.startswith("the baseline scores")
        assert f"{100 * share:.1f}%" in record.why_not
    alone = pair(baseline, None)
    assert alone.gates is gates
    assert gates or "the model scores" in str(alone.why_not)


def test_clusters_widen_the_interval() -> None:
    """Ten clusters, each all right or all wrong, are worth ten items and not a hundred."""
    correct = [1] * 70 + [0] * 30
    clusters = [f"c{number // 10}" for number in range(100)]
    plain, clustered = accuracy_interval(correct, None), accuracy_interval(correct, clusters)
    assert plain.estimate == clustered.estimate == 0.7
    assert clustered.high - clustered.low > 2 * (plain.high - plain.low)
    assert 0.0 <= clustered.low < clustered.high <= 1.0
    assert accuracy_interval(correct, ["one"] * 100) == plain
    record = pair(scores(correct, clusters=clusters), None)
    assert record.clusters == clusters
    same = accuracy_interval([1, 1, 1, 1], ["a", "a", "b", "b"])
    assert same == accuracy_interval([1, 1, 1, 1], None), "clusters that agree are no proof of certainty"
    assert same.low < 0.6
    assert (record.accuracy.low, record.accuracy.high) == (clustered.low, clustered.high)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("names", {"name": "piqa"}),
        ("metrics", {"metric": "acc_norm"}),
        ("definitions", {"config_sha256": "e" * 64}),
        ("items", {"items": scores(BASE[:-1]).items}),
        ("data", {"data_sha256": "e" * 64}),
        ("prompts", {"items": with_item(scores(BASE), 3, prompt_hash="e" * 64).items}),
        ("clusters", {"clusters": ("x",) * 100}),
    ],
)
def test_what_differs_is_not_compared(what: str, change: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match=f"their {what} differ"):
        pair(scores(GOOD), replace(scores(BASE), **change))


def test_no_items_is_no_record() -> None:
    empty = replace(scores([1]), items=())
    with pytest.raises(WorkError, match="no items"):
        pair(empty, None)
    assert math.isnan(empty.accuracy)


def test_answers_are_equal_only_where_the_model_gave_the_same() -> None:
    first = scores(GOOD)
    assert first.answers_sha256 == scores(BASE).answers_sha256  # the same answers, judged otherwise
    noise = with_item(first, 0, choice_lls=(-1.0 + 1e-12, -2.0))
    assert noise.answers_sha256 == first.answers_sha256
    other = with_item(first, 0, choice_lls=(-1.0 + 1e-8, -2.0))
    assert other.answers_sha256 != first.answers_sha256
    assert with_item(first, 0, answer="yes").answers_sha256 != first.answers_sha256


def test_prompts_hash_covers_every_item() -> None:
    first = scores(GOOD)
    assert first.prompts_sha256 == scores(BASE).prompts_sha256
    assert with_item(first, 99, prompt_hash="e" * 64).prompts_sha256 != first.prompts_sha256


def test_scores_are_plain_values() -> None:
    task: TaskScores = scores(GOOD)
    assert (task.correct, task.item_ids[:2], task.accuracy) == (GOOD, ["000000", "000001"], 0.9)
