"""How many items and prompts a policy's suite holds, for the plan: from the suite and its data, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compress.errors import UserError
from compress.evaluation.gating.scoring import suite_of
from compress.evaluation.policy import Policy


def items_of(policy: Policy) -> Callable[[str], int | None]:
    """Task name -> its number of items; None where its data is not here to be counted.

    Raises (when called):
        UserError: the suite has no such task, so that no record of it could serve the gate.
    """
    tasks = {Path(task.name).stem: task for task in suite_of(policy).tasks}

    def items(name: str) -> int | None:
        if name not in tasks:
            raise UserError(
                f"a gate is about the task {name!r}, which the suite {policy.suite!r} does not hold",
                f"its tasks: {', '.join(tasks) or 'none'}",
            )
        task = tasks[name]
        if task.items is not None:
            return task.items
        from compress.evaluation.harness.run import resolve

        try:
            rows = resolve(task).rows
        except UserError:
            return None
        return None if rows is None else len(rows)

    return items


def prompts_of(policy: Policy) -> int | None:
    """Number of prompts; None where the suite does not generate."""
    generation = suite_of(policy).generation
    return None if generation is None else len(generation.prompts)
