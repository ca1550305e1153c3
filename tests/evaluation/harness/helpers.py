"""Ready-made scores for tests that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compress.evaluation.harness import ItemScore, TaskScores


def item(number: int, correct: int, *, lls: tuple[float, ...] = (-1.0, -2.0)) -> ItemScore:
    """A multiple-choice item."""
    return ItemScore(
        item_id=f"{number:06d}",
        doc_hash="d" * 64,
        prompt_hash="p" * 64,
        correct=correct,
        pred=0,
        choice_lls=lls,
        nll=-lls[0],
        n_tok=3,
        n_bytes=12,
    )


def scores(correct: Sequence[int], *, clusters: Sequence[str] | None = None, chance: float = 0.5) -> TaskScores:
    """A task with these outcomes."""
    return TaskScores(
        name="blimp",
        kind="multiple_choice",
        metric="acc",
        data_sha256="a" * 64,
        config_sha256="c" * 64,
        items=tuple(item(number, value) for number, value in enumerate(correct)),
        chance=chance,
        clusters=None if clusters is None else tuple(clusters),
        metrics={"acc": sum(correct) / len(correct)},
    )


def with_item(task: TaskScores, number: int, **changes: object) -> TaskScores:
    """The scores with one item changed."""
    items = list(task.items)
    items[number] = replace(items[number], **changes)  # type: ignore[arg-type]
    return replace(task, items=tuple(items))
