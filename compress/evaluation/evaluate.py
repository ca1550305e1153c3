"""`evaluate`: score a model, against a baseline or alone, and give the record that `eval.json` holds.

Texts run through both models in lock-step; tasks and prompts are answered by one model after the other and compared
item by item. Everything that was finished when a run was killed is found again in `cache_dir`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import UserError
from compress.evaluation.generation import compare_generation
from compress.evaluation.kept_answers import Answering
from compress.evaluation.opened import Opened, open_model
from compress.evaluation.record_parts import TaskRecord
from compress.evaluation.records import CostRecord, EvalRecord
from compress.evaluation.same_tokenizer import require_same_tokenizer
from compress.evaluation.scope import resolve
from compress.evaluation.scoring_kernel import chosen_kernel
from compress.evaluation.suites import Suite, SuiteTask
from compress.evaluation.text_scores import Loaded, score_text
from compress.progress import OfModel, Progress

TEXTS, ANSWERS, COST = "texts", "greedy answers", "speed and memory"
"""What only a model's own files can be scored on, as messages name it."""

EXTRA_HINT = "pip install 'compress[eval]'"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A record, and the file of what each item of its tasks was answered; None where there were no tasks."""

    record: EvalRecord
    samples: bytes | None


def evaluate(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    suite: str | Path | Suite | None = None,
    data: str | Path | None = None,
    tasks: Sequence[str | SuiteTask] = (),
    max_tokens: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    cost: bool = False,
    cache_dir: str | Path | None = None,
    batch_tokens: int | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> EvalRecord:
    """Scores a model directory, an artifact or, on tasks alone, a served model by its address; with a `baseline` also
    all that compares the two.

    suite: a packaged suite by name, a suite file, or a `Suite`. data: the name of a packaged text or the path of a
    UTF-8 file, in place of the suite's texts. tasks: names or files, besides the suite's. Without any of them: the
    packaged held-out text. max_tokens: at most so many tokens of each text, spread evenly over it. seq_len: tokens per
    window, begin token included (default 512, or the context where that is shorter). dtype: compute dtype of both
    models; `auto` is float32 on the CPU. kernel: what computes both, `auto`, `cpu`, `cpu-int8`, `triton` or `reference`
    (`scoring_kernel`). cost: measure speed and memory too. cache_dir: where finished answers are kept; a killed
    evaluation goes on from there. batch_tokens: tokens per forward pass; chosen by size where None. trust_code: whether
    to execute what a task names, or what the model writes for a task that runs it.

    Raises:
        UserError: no such model, suite, text or task, text too short, window beyond the context.
        IntegrityError: damaged files, an artifact that was changed, a baseline with another tokenizer or vocabulary.
        WorkError: logits that are not finite, out of memory, a cache that cannot be written.
    """
    return evaluate_with_samples(
        model,
        baseline,
        suite=suite,
        data=data,
        tasks=tasks,
        max_tokens=max_tokens,
        seq_len=seq_len,
        device=device,
        dtype=dtype,
        kernel=kernel,
        cost=cost,
        cache_dir=cache_dir,
        batch_tokens=batch_tokens,
        trust_code=trust_code,
        progress=progress,
    ).record


def evaluate_with_samples(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    suite: str | Path | Suite | None = None,
    data: str | Path | None = None,
    tasks: Sequence[str | SuiteTask] = (),
    max_tokens: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    cost: bool = False,
    cache_dir: str | Path | None = None,
    batch_tokens: int | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """As `evaluate`, with what each item of the tasks was answered."""
    scope = resolve(suite, data=data, tasks=tasks, max_tokens=max_tokens, seq_len=seq_len, cost=cost)
    wanted, keep = scope.suite, None if cache_dir is None else Path(cache_dir)
    _check_tasks(wanted.tasks, trust_code)
    kernel = chosen_kernel([path for path in (model, baseline) if path is not None], device, dtype, kernel, progress)
    candidate = open_model(model, device, dtype, kernel)
    reference = None if baseline is None else open_model(baseline, device, dtype, kernel)
    if reference is not None:
        require_same_tokenizer(candidate.model, reference.model)
    _check_local(wanted, [candidate] if reference is None else [candidate, reference])
    texts = [
        score_text(
            text.name,
            _local(candidate),
            None if reference is None else _local(reference),
            candidate.environment,
            seq_len=text.seq_len,
            max_tokens=text.max_tokens,
            batch_tokens=batch_tokens,
            keep=keep,
            progress=progress,
        )
        for text in wanted.texts
    ]
    tasks_scored, samples = _tasks(wanted.tasks, candidate, reference, keep, trust_code, progress)
    generation = None
    if wanted.generation is not None:
        generation = compare_generation(
            _answering(candidate, keep),
            None if reference is None else _answering(reference, keep),
            wanted.generation.prompts,
            wanted.generation.max_tokens,
            progress,
        )
    ours, theirs = _cost(candidate, reference, kernel, progress) if wanted.cost else (None, None)
    record = EvalRecord(
        artifact_id=candidate.artifact_id,
        model=candidate.model,
        baseline=None if reference is None else reference.model,
        environment=candidate.environment,
        suite=scope.record,
        texts=texts,
        tasks=tasks_scored,
        generation=generation,
        cost=ours,
        cost_baseline=theirs,
    ).sealed()
    return Evaluation(record, samples)


def can_run_tasks() -> bool:
    """Whether what the extra `eval` installs is here: tasks need it, texts and greedy answers do not."""
    return all(importlib.util.find_spec(name) is not None for name in ("lm_eval", "datasets"))


def _check_local(suite: Suite, opened: Sequence[Opened]) -> None:
    """Before the work: a model behind an address answers tasks alone. Raises UserError."""
    for what, wanted in ((TEXTS, suite.texts), (ANSWERS, suite.generation), (COST, suite.cost)):
        for model in opened:
            if wanted:
                model.local(what)


def _local(opened: Opened) -> Loaded:
    return opened.local(TEXTS), opened.model


def _answering(opened: Opened, keep: Path | None) -> Answering:
    return Answering(opened.local(ANSWERS), keep, opened.identity())


def _check_tasks(tasks: Sequence[SuiteTask], trust_code: bool) -> None:
    """Before the work: every task must be there, and lm-eval too. Raises UserError, IntegrityError."""
    if not tasks:
        return
    if not can_run_tasks():
        raise UserError("tasks run on lm-eval, which is not installed", EXTRA_HINT)
    from compress.evaluation.harness.run import resolve as resolve_task

    for task in tasks:
        resolve_task(task, trust_code=trust_code)


def _tasks(
    tasks: Sequence[SuiteTask],
    candidate: Opened,
    reference: Opened | None,
    keep: Path | None,
    trust_code: bool,
    progress: Progress | None,
) -> tuple[list[TaskRecord], bytes | None]:
    """The tasks' records in order, and the file of the candidate's answers."""
    if not tasks:
        return [], None
    from compress.evaluation import samples
    from compress.evaluation.harness import ResponseCache, TaskScores, pair, run_tasks

    def answers(opened: Opened) -> list[TaskScores]:
        cache = None if keep is None else ResponseCache(keep, opened.identity())
        named = None if progress is None else OfModel(progress, opened.model.name)
        return run_tasks(opened.runtime, tasks, cache, named, trust_code=trust_code)

    ours = answers(candidate)
    theirs = [None] * len(ours) if reference is None else answers(reference)
    return [pair(mine, other) for mine, other in zip(ours, theirs, strict=True)], samples.to_bytes(ours)


def _cost(
    candidate: Opened, reference: Opened | None, kernel: str, progress: Progress | None
) -> tuple[CostRecord, CostRecord | None]:
    from compress.evaluation.costs.measure import Settings, measure, measure_pair

    ours, settings = candidate.local(COST), Settings(kernel=kernel)
    if reference is None:
        return measure(ours, settings=settings, progress=progress), None
    return measure_pair(ours, reference.local(COST), settings=settings, progress=progress)
