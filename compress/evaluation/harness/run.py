"""`run_tasks`: one model through tasks, by lm-eval's own evaluation loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UserError
from compress.evaluation.harness import selection
from compress.evaluation.harness.cache import ResponseCache
from compress.evaluation.harness.definitions import resolve_packaged
from compress.evaluation.harness.jsonl_tasks import resolve_jsonl
from compress.evaluation.harness.resolved import Resolved
from compress.evaluation.harness.scores import TaskScores
from compress.evaluation.harness.yaml_tasks import resolve_yaml
from compress.evaluation.suites import SEED, SuiteTask
from compress.progress import Progress
from compress.runtime.protocol import Runtime

if TYPE_CHECKING:
    from compress.evaluation.harness.endpoint import Endpoint

_FILES = {".jsonl": resolve_jsonl, ".yaml": resolve_yaml, ".yml": resolve_yaml}


def run_tasks(
    runtime: Runtime | Endpoint,
    tasks: Sequence[SuiteTask],
    cache: ResponseCache | None = None,
    progress: Progress | None = None,
    *,
    trust_code: bool = False,
) -> list[TaskScores]:
    """Scores one model on tasks, in order; all of them go through the model together, so that batches are full.

    cache: what the model answered before is taken from there, and what it answers is kept. trust_code: whether to
    execute what a task names, or what the model writes for a task that runs it.

    Raises:
        UserError: no such task, data that is not there, a task file that is not as it should be, code to execute
            without `trust_code`, or a model that a task does not fit.
        IntegrityError: data that is not what scores are compared on.
        WorkError: log-likelihoods that are not finite, out of memory, a cache that cannot be written.
    """
    resolved = [resolve(task, trust_code=trust_code) for task in tasks]
    names = [task.name for task in resolved]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two tasks are called {twice[0]!r}", "give one of the files another name")
    if not resolved:
        return []
    from compress.evaluation.harness.collect import collect
    from compress.evaluation.harness.templates import quiet

    model = _language_model(runtime, cache, progress)
    own = [task.name for task in resolved if task.user]
    with quiet():
        try:
            loaded, results = _evaluate(model, resolved, trust_code)
        except (CompressError, MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            if not own:
                raise
            raise UserError(
                f"lm-eval cannot run {', '.join(own)}: {type(error).__name__}: {_first_line(error)}",
                "mend the task file; --debug shows where lm-eval failed",
            ) from error
        return [collect(task, loaded[task.name], results, model.token_counts) for task in resolved]


def resolve(task: SuiteTask, *, trust_code: bool = False) -> Resolved:
    """A packaged task by name, or the user's own by a path that ends in .jsonl, .yaml or .yml.

    Raises:
        UserError, IntegrityError: as `run_tasks`.
    """
    reader = _FILES.get(Path(task.name).suffix)
    return (reader or resolve_packaged)(task, trust_code=trust_code)


def _evaluate(model: Any, resolved: Sequence[Resolved], trust_code: bool) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """lm-eval's task objects by name, and its results."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([task.config for task in resolved])
    chosen: dict[str, list[int]] = {}
    for task in resolved:
        made: Any = loaded["tasks"][task.name]
        if made.config.num_fewshot is None:
            made.set_config("num_fewshot", 0)
        made.set_fewshot_seed(SEED)
        if task.rows is None and task.items is not None:
            chosen[task.name] = _choose(task, len(made.eval_docs))
    results = evaluate(
        lm=model,
        task_dict=loaded,
        samples=chosen or None,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=trust_code,
    )
    return loaded["tasks"], results


def _choose(task: Resolved, count: int) -> list[int]:
    """The chosen item numbers in ascending order, as lm-eval needs them to name items rightly."""
    assert task.items is not None
    if task.items > count:
        raise UserError(f"the task {task.name} has {count} items, not {task.items}", "ask for fewer")
    return sorted(selection.order([""] * count, task.seed, task.name)[: task.items])


def _language_model(runtime: Runtime | Endpoint, cache: ResponseCache | None, progress: Progress | None) -> Any:
    from compress.evaluation.harness.endpoint import Endpoint
    from compress.evaluation.harness.endpoint_model import EndpointLM
    from compress.evaluation.harness.model import RuntimeLM

    if isinstance(runtime, Endpoint):
        return EndpointLM(runtime, cache, progress)
    return RuntimeLM(runtime, cache, progress)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
