"""The packaged tasks: lm-eval definitions as YAML in `eval/tasks`, and the data they are asked on.

A definition holds lm-eval's own keys under `lm_eval`; `data` says what lm-eval does not know: the file, how its rows
are read, what its strata and clusters are; `metric` which of lm-eval's metrics decides whether an item is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from compress import content
from compress.artifact.canonical import sha256_json
from compress.errors import UserError
from compress.evaluation.harness import rows, selection
from compress.evaluation.harness.data import MissingDataError, find_data, shipped_file, shipped_items
from compress.evaluation.harness.resolved import Resolved, inline_dataset
from compress.evaluation.harness.scores import Metric
from compress.evaluation.suites import SEED, SuiteTask
from compress.recipe_problems import nearest


class Source(BaseModel):
    """Where a task's items come from. `test`, and `train` that examples are taken from: paths below a data directory,
    or below `eval/data` with `ships`. `reader` names a function of `rows`; `stratum` and `cluster` fields of an item.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    test: str
    train: str | None = None
    ships: bool = False
    reader: Literal["jsonl", "truthfulqa", "mmlu"] = "jsonl"
    stratum: str | None = None
    cluster: str | None = None


class Definition(BaseModel):
    """One file of `eval/tasks`. `executes`: what the model writes is executed to score it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str
    metric: Metric
    data: Source
    lm_eval: dict[str, Any]
    executes: bool = False


def packaged_tasks() -> dict[str, Path]:
    """The definitions that ship, by task name."""
    return {path.stem: path for path in sorted((content.eval_dir() / "tasks").glob("*.yaml"))}


def definition(name: str) -> Definition:
    """A packaged task's definition. Raises UserError naming the tasks there are."""
    found = packaged_tasks()
    if name not in found:
        raise UserError(
            f"there is no task {name!r}{nearest(name, list(found))}",
            "name a packaged task, or give the path of a .jsonl or .yaml file",
        )
    return Definition.model_validate(yaml.safe_load(found[name].read_text(encoding="utf-8")))


def resolve_packaged(task: SuiteTask, *, trust_code: bool) -> Resolved:
    """A packaged task with its chosen items.

    Raises:
        UserError: no such task, no data, more items than there are, or code to execute without `trust_code`.
        IntegrityError: a data file is not the one it should be.
    """
    found = definition(task.name)
    if found.executes and not trust_code:
        raise UserError(
            f"the task {task.name} executes code that the model writes",
            "where that is safe (a container without secrets or network), allow it with --trust-code",
        )
    chosen = from_shipped(task)
    examples = None
    try:
        chosen = chosen or from_data(task, found.data)
        if found.data.train is not None and found.data.reader == "jsonl":
            examples = rows.jsonl(find_data(found.data.train))
    except MissingDataError as error:
        count = shipped_items(f"tasks/{task.name}.jsonl")
        ships = f"; {count} of its items ship: {task.name}:{count}" if count else ""
        raise UserError(error.message, error.hint + ships) from error
    config = {**found.lm_eval, "task": task.name, **inline_dataset(list(chosen.values()), examples)}
    if found.executes:
        from compress.evaluation.harness.execution import passes_tests

        config["process_results"] = passes_tests
    return Resolved(
        name=task.name,
        config=config,
        config_sha256=sha256_json(found.model_dump(mode="json", exclude={"about"})),
        metric=found.metric,
        rows=chosen,
        cluster=found.data.cluster,
    )


def from_shipped(task: SuiteTask) -> dict[str, rows.Row] | None:
    """The chosen items by id from those that ship; None where the choice goes beyond them.

    Raises:
        IntegrityError: the shipped file was changed.
    """
    path = f"tasks/{task.name}.jsonl"
    if task.seed != SEED or task.items is None or task.items > shipped_items(path):
        return None
    entries = rows.jsonl(shipped_file(path))[: task.items]
    return dict(sorted((entry["id"], entry["doc"]) for entry in entries))


def from_data(task: SuiteTask, source: Source) -> dict[str, rows.Row]:
    """The chosen items by id from the whole data file.

    Raises:
        UserError: the file is not there, or has fewer items.
        IntegrityError: it is not the file it should be.
    """
    find = shipped_file if source.ships else find_data
    train = None if source.train is None else find(source.train)
    everything = rows.READERS[source.reader](find(source.test), train)
    if task.items is not None and task.items > len(everything):
        raise UserError(
            f"the task {task.name} has {len(everything)} items, not {task.items}",
            "ask for fewer, or leave the number out",
        )
    strata = ["" if source.stratum is None else str(row[source.stratum]) for row in everything]
    chosen = sorted(selection.order(strata, task.seed, task.name)[: task.items])
    return {selection.item_id(number): everything[number] for number in chosen}
