"""What one evaluation scores: a suite, changed or replaced by what the caller asks for. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from compress.errors import UserError
from compress.evaluation.record_parts import SuiteRecord
from compress.evaluation.suites import Suite, SuiteTask, SuiteText, load_suite, task_of
from compress.evaluation.text import DEFAULT

SMOKE = "smoke"
"""The suite that ends every run that makes an artifact."""


class Scope(NamedTuple):
    """What to score, and the record that names it: None where no suite was asked for."""

    suite: Suite
    record: SuiteRecord | None


def resolve(
    suite: str | Path | Suite | None = None,
    *,
    data: str | Path | None = None,
    tasks: Sequence[str | SuiteTask] = (),
    max_tokens: int | None = None,
    seq_len: int | None = None,
    cost: bool = False,
) -> Scope:
    """The suite that results: `data` replaces the suite's texts, `tasks` are added to its tasks (one of the same name
    is replaced), `max_tokens` and `seq_len` hold for every text, `cost` adds the cost.

    Without suite, data, tasks and cost: the packaged held-out text. The record's hash is that of the suite as changed.

    Raises:
        UserError: no such suite, or a bad one; limits for texts where there are none.
    """
    given = load_suite(suite) if isinstance(suite, str | Path) else suite
    texts = [] if given is None else list(given.texts)
    if data is not None:
        texts = [SuiteText(name=str(data) or ".")]  # an empty name is refused as a path that is no file
    elif given is None and not tasks and not cost:
        texts = [SuiteText(name=DEFAULT)]
    limits = {"max_tokens": max_tokens, "seq_len": seq_len}
    changed = {name: value for name, value in limits.items() if value is not None}
    if changed and not texts:
        raise UserError(
            f"{' and '.join(changed)} hold for texts, and no text is to be scored",
            f"name one (--data {DEFAULT}), or leave them out",
        )
    wanted = {task.name: task for task in ([] if given is None else given.tasks)}
    for task in tasks:
        chosen = task_of(task) if isinstance(task, str) else task
        wanted[chosen.name] = chosen
    result = Suite(
        name="-" if given is None else given.name,
        texts=[text.model_copy(update=changed) for text in texts],
        tasks=list(wanted.values()),
        generation=None if given is None else given.generation,
        cost=cost or (given is not None and given.cost),
    )
    return Scope(result, None if given is None else SuiteRecord(name=result.name, sha256=result.sha256()))
