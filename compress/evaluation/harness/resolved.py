"""A task ready to run: lm-eval's configuration of it, and the items that were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.artifact.canonical import sha256_json
from compress.evaluation.harness.scores import Metric


@dataclass(frozen=True, slots=True)
class Resolved:
    """config: what lm-eval loads. metric: which of its metrics decides whether an item is right; None: the first of
    `acc`, `exact_match` that the task has.

    rows: the chosen items by id, ordered by id, in the order in which lm-eval meets them; None where lm-eval reads the
    data itself, of which `items` are then chosen by `seed`. cluster: the field that names an item's cluster. user:
    whether the task is the user's own, so that its mistakes are told as such.
    """

    name: str
    config: dict[str, Any]
    config_sha256: str
    metric: Metric | None = None
    rows: Mapping[str, Mapping[str, Any]] | None = None
    cluster: str | None = None
    user: bool = False
    items: int | None = None
    seed: int = 0


def reading_problem(error: OSError | UnicodeDecodeError) -> str:
    """Why a task file cannot be read, in words."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.start})"
    return error.strerror or type(error).__name__


def data_sha256(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Over the items' ids and data: the same for the same choice from a whole file and from what ships of it."""
    return sha256_json([[item_id, row] for item_id, row in rows.items()])


def inline_dataset(
    test: Sequence[Mapping[str, Any]], train: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """lm-eval's keys for rows that are here already, as its splits `test` and `train`."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        splits = {"test": test} if train is None else {"test": test, "train": train}
        return {name: Dataset.from_list(list(rows)) for name, rows in splits.items()}

    keys: dict[str, Any] = {"custom_dataset": dataset, "test_split": "test"}
    return keys if train is None else {**keys, "fewshot_split": "train"}
