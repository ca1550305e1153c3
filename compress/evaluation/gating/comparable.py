"""Refuses to compare what differs in more than the weights, and models that answer as if they were one."""

from __future__ import annotations

from collections.abc import Iterator

from compress.errors import IntegrityError
from compress.evaluation.gating.comparison import Comparison
from compress.evaluation.records import EvalRecord, ModelRecord
from compress.evaluation.same_tokenizer import require_same_tokenizer

_SHOWN = 40  # letters of a value that an error repeats


def compare(
    record: EvalRecord, alone: EvalRecord | None = None, *, name: str = "baseline", allow_identical: bool = False
) -> Comparison:
    """The comparison in one record that has a baseline, or of a record with one of the baseline's own.

    Raises:
        IntegrityError: the two differ in tokenizer, tokens, items, prompts, task configuration or arithmetic; or the
            candidate's answers are exactly the baseline's although its weights are not (unless `allow_identical`).
    """
    if alone is None:
        if record.baseline is None:
            raise IntegrityError(
                f"the record of {record.model.name} has no baseline",
                "run `compress eval CANDIDATE --baseline BASELINE`, or give --baseline",
            )
        require_same_tokenizer(record.model, record.baseline)
        found = Comparison(name, record, record.baseline)
    else:
        same = scored_together(record, alone)
        _check(record, alone, arithmetic=not same)
        found = Comparison(name, record, alone.model, None if same else alone)
    if not allow_identical and found.candidate.digest != found.baseline.digest:
        _must_differ(found)
    return found


def scored_together(record: EvalRecord, alone: EvalRecord) -> bool:
    """Whether the baseline of a record is the model that another was scored alone of."""
    return record.baseline is not None and record.baseline.digest == alone.model.digest


def _check(record: EvalRecord, alone: EvalRecord, *, arithmetic: bool) -> None:
    for what, ours, theirs in _pairs(record, alone, arithmetic):
        if ours != theirs:
            values = f": {ours} and {theirs}" if max(len(str(ours)), len(str(theirs))) <= _SHOWN else ""
            raise IntegrityError(
                f"the records of {record.model.name} and {alone.model.name} cannot be compared: another {what}{values}",
                "score both on the same data with the same settings (--kernel too), or give the two models",
            )


def _pairs(record: EvalRecord, alone: EvalRecord, arithmetic: bool) -> Iterator[tuple[str, object, object]]:
    yield "tokenizer", record.model.tokenizer_sha256, alone.model.tokenizer_sha256
    if arithmetic:
        theirs = alone.environment.arithmetic()
        yield from ((field, value, theirs[field]) for field, value in record.environment.arithmetic().items())
    texts = {text.data.name: text for text in alone.texts}
    for text in record.texts:
        if text.data.name in texts:
            other = texts[text.data.name]
            yield f"text under the name {text.data.name}", text.data.sha256, other.data.sha256
            yield f"cut of the tokens of {text.data.name}", text.data.windows_sha256, other.data.windows_sha256
            yield f"grouping of the tokens of {text.data.name}", text.clusters.tokens, other.clusters.tokens
    tasks = {task.name: task for task in alone.tasks}
    for task in record.tasks:
        if task.name in tasks:
            other_task = tasks[task.name]
            yield f"number of items of {task.name}", len(task.item_ids), len(other_task.item_ids)
            yield f"choice of items of {task.name}", task.item_ids, other_task.item_ids
            for what, field in (
                ("version of the data", "data_sha256"),
                ("configuration", "config_sha256"),
                ("wording of the prompts", "prompts_sha256"),
                ("metric", "metric"),
            ):
                yield f"{what} of {task.name}", getattr(task, field), getattr(other_task, field)


def _must_differ(found: Comparison) -> None:
    """Different weights cannot give the same log-probabilities to the last bit: something else was scored."""
    record, alone = found.record, found.alone
    for text in record.texts:
        if alone is None:
            same = text.clusters.kl is not None and not any(text.clusters.kl)
        else:
            other = next((each for each in alone.texts if each.data.name == text.data.name), None)
            same = other is not None and other.clusters.nll == text.clusters.nll
        if same:
            _refuse(found.candidate, found.baseline, f"the text {text.data.name}")
    for task in record.tasks:
        if alone is None:
            answers = task.answers_baseline_sha256
        else:
            answers = next((each.answers_sha256 for each in alone.tasks if each.name == task.name), None)
        if task.kind != "generate" and answers == task.answers_sha256:
            _refuse(found.candidate, found.baseline, f"the task {task.name}")


def _refuse(candidate: ModelRecord, baseline: ModelRecord, where: str) -> None:
    raise IntegrityError(
        f"{candidate.name} answers exactly as {baseline.name} does on {where}, although their weights differ",
        "the wrong weights were scored, or answers were taken from a cache: check what the candidate's directory holds "
        "and score again; for a candidate that is meant to be the same function, set allow_identical in the policy",
    )
