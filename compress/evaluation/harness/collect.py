"""From lm-eval's results of a task to scores item by item."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from compress.artifact.canonical import sha256_json
from compress.errors import UserError, WorkError
from compress.evaluation.harness import selection
from compress.evaluation.harness.resolved import Resolved, data_sha256
from compress.evaluation.harness.scores import JUDGING, ItemScore, Kind, Metric, TaskScores

_KINDS: dict[str, Kind] = {
    "multiple_choice": "multiple_choice",
    "loglikelihood": "loglikelihood",
    "generate_until": "generate",
}

Sample = Mapping[str, Any]


def collect(
    task: Resolved, made: Any, results: Mapping[str, Any], token_counts: Mapping[tuple[str, str], int]
) -> TaskScores:
    """The scores of one task. made: lm-eval's task object. token_counts: tokens of each (context, continuation).

    Raises:
        UserError: the task has no metric that calls an item right or wrong.
        WorkError: lm-eval gave no results for some item.
    """
    logged: Sequence[Sample] = results["samples"][task.name]
    first = [sample for sample in logged if sample["filter"] == logged[0]["filter"]]
    rows = task.rows or {selection.item_id(s["doc_id"]): json.loads(json.dumps(s["doc"], default=str)) for s in first}
    if len(rows) != len(first):
        raise WorkError(f"{task.name}: {len(first)} results for {len(rows)} items", "run it again")
    samples = dict(zip(rows, sorted(first, key=lambda sample: int(sample["doc_id"])), strict=True))
    kind = _KINDS[made.OUTPUT_TYPE]
    metric = task.metric or _metric(task, first[0])
    within = "acc" if metric == "exact_match" and "exact_match" not in first[0] else metric
    items, chances = [], []
    for item_id in sorted(rows):
        sample = samples[item_id]
        facts = {
            "item_id": item_id,
            "doc_hash": sha256_json(rows[item_id]),
            "prompt_hash": sha256_json([item_id, sample["arguments"]]),
            "correct": _flag(task, sample, within),
        }
        chance = 0.0
        if kind == "multiple_choice":
            item, chance = _choice(made, sample, metric, token_counts, facts)
        elif kind == "loglikelihood":
            item = _target(sample, token_counts, facts)
        else:
            item = _answer(sample, facts)
        items.append(item)
        chances.append(chance)
    ordered = {item_id: rows[item_id] for item_id in sorted(rows)}
    return TaskScores(
        name=task.name,
        kind=kind,
        metric=metric,
        data_sha256=data_sha256(ordered),
        config_sha256=task.config_sha256,
        items=tuple(items),
        chance=math.fsum(chances) / len(chances),
        clusters=None if task.cluster is None else tuple(str(row[task.cluster]) for row in ordered.values()),
        metrics=_numbers(results["results"][task.name], first[0]["filter"]),
    )


def _metric(task: Resolved, sample: Sample) -> Metric:
    for name in JUDGING:
        if name in sample["metrics"]:
            return name
    raise UserError(
        f"the task {task.name} has no metric that calls an item right or wrong",
        f"give it one of {', '.join(JUDGING)}",
    )


def _flag(task: Resolved, sample: Sample, metric: str) -> int:
    value = float(sample[metric])
    if value not in (0.0, 1.0):
        raise UserError(
            f"the task {task.name} scores an item {value} in {metric}", "items must be right (1) or wrong (0)"
        )
    return int(value)


def _choice(
    made: Any, sample: Sample, metric: Metric, token_counts: Mapping[tuple[str, str], int], facts: dict[str, Any]
) -> tuple[ItemScore, float]:
    choices = made.doc_to_choice(sample["doc"])
    lls = tuple(float(answers[0][0]) for answers in sample["resps"])[: len(choices)]
    ranked = lls
    if metric == "acc_norm":  # an empty choice is never the likeliest, as in lm-eval
        ranked = tuple(ll / len(choice) if choice else -math.inf for ll, choice in zip(lls, choices, strict=True))
    gold = made.doc_to_text(sample["doc"]) if made.multiple_input else sample["target"]
    right = gold if isinstance(gold, list) else [choices.index(gold) if isinstance(gold, str) else int(gold)]
    texts = sample["arguments"][right[0]]
    item = ItemScore(
        **facts,
        pred=max(range(len(ranked)), key=ranked.__getitem__),
        choice_lls=lls,
        nll=-lls[right[0]],
        n_tok=token_counts[(texts[0], texts[1])],
        n_bytes=len(texts[1].encode()),
    )
    return item, len(right) / len(choices)


def _target(sample: Sample, token_counts: Mapping[tuple[str, str], int], facts: dict[str, Any]) -> ItemScore:
    context, target = sample["arguments"][0]
    total, greedy = sample["resps"][0][0]
    return ItemScore(
        **facts,
        pred=int(greedy),
        nll=-float(total),
        n_tok=token_counts[(context, target)],
        n_bytes=len(target.encode()),
    )


def _answer(sample: Sample, facts: dict[str, Any]) -> ItemScore:
    return ItemScore(**facts, pred=str(sample["filtered_resps"][0]), answer=str(sample["resps"][0][0]))


def _numbers(results: Mapping[str, Any], chosen: str) -> dict[str, float]:
    """lm-eval's own aggregates of the task that are finite numbers, by metric."""
    found = {}
    for key, value in results.items():
        name, _, by = key.partition(",")
        if by == chosen and not name.endswith("_stderr") and isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found
