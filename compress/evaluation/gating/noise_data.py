"""What a noise floor is measured on: the text, tasks and prompts that a policy scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.evaluation.gating.scoring import suite_of
from compress.evaluation.policy import Policy
from compress.evaluation.text import DEFAULT

if TYPE_CHECKING:
    from compress.evaluation.suites import SuiteTask
    from compress.runtime.protocol import Runtime


def noise_data(policy: Policy) -> dict[str, Any]:
    """Arguments of `measure_noise`: of a suite its first text, all its tasks and its prompts."""
    from compress.evaluation.suites import SuiteTask

    if policy.suite is None:
        tasks = [SuiteTask(name=gate.task, items=gate.items) for gate in policy.tasks()]
        scores = _answering(tasks) if tasks else None
        limits = {"max_tokens": policy.max_tokens, "seq_len": policy.seq_len}
        return {"data": policy.data or DEFAULT, **limits, "tasks": scores}
    suite = suite_of(policy)
    first = suite.texts[0] if suite.texts else None
    return {
        "data": None if first is None else first.name,
        "max_tokens": None if first is None else first.max_tokens,
        "seq_len": None if first is None else first.seq_len,
        "tasks": _answering(suite.tasks) if suite.tasks else None,
        "prompts": () if suite.generation is None else suite.generation.prompts,
        "answer_tokens": 0 if suite.generation is None else suite.generation.max_tokens,
    }


def _answering(tasks: list[SuiteTask]) -> Any:
    def answers(runtime: Runtime) -> dict[str, list[int]]:
        from compress.evaluation.harness import run_tasks

        return {task.name: [item.correct for item in task.items] for task in run_tasks(runtime, tasks, None, None)}

    return answers
