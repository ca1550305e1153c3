"""`eval.json`: one model scored on texts, tasks and prompts, alone or against a baseline. Free of torch.

A record carries the hashes of everything that decides its numbers, its sums per cluster and its answers per item (not
only means, so that two records can be compared in pairs) and its own hash, so that a cut or edited file is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, model_validator

from compress.artifact import durable
from compress.artifact.canonical import sha256_json
from compress.errors import IntegrityError, UserError
from compress.evaluation.costs.record import CostRecord
from compress.evaluation.record_base import Count, Digest, Flag, IntervalRecord, Positive, Seconds, Share, _Record
from compress.evaluation.record_parts import (
    DataRecord,
    EnvironmentRecord,
    GenerationRecord,
    ModelRecord,
    SuiteRecord,
    TaskRecord,
    TextRecord,
)
from compress.evaluation.summary import (
    KL_THRESHOLDS,
    ClusterSums,
    DpPercentiles,
    KlPercentiles,
    Summary,
    same_summary,
    summarise,
)

__all__ = [
    "KL_THRESHOLDS",
    "ClusterSums",
    "CostRecord",
    "Count",
    "DataRecord",
    "Digest",
    "DpPercentiles",
    "EnvironmentRecord",
    "EvalRecord",
    "Flag",
    "GenerationRecord",
    "IntervalRecord",
    "KlPercentiles",
    "ModelRecord",
    "Positive",
    "Seconds",
    "Share",
    "SuiteRecord",
    "Summary",
    "TaskRecord",
    "TextRecord",
    "parse_record",
    "read_record",
    "summarise",
    "write_record",
]

SCHEMA_VERSION = 3
_HINT = "score the model again with `compress eval`"


class EvalRecord(_Record):
    """The whole of eval.json. Make one with `sealed`; read one with `read_record`.

    `artifact_id` is the artifact whose scores these are, None if the model is no artifact. Texts and tasks are in the
    order in which they were scored.
    """

    schema_version: Literal[3] = 3
    kind: Literal["compress.eval"] = "compress.eval"
    artifact_id: Digest | None
    model: ModelRecord
    baseline: ModelRecord | None
    environment: EnvironmentRecord
    suite: SuiteRecord | None
    texts: list[TextRecord]
    tasks: list[TaskRecord]
    generation: GenerationRecord | None
    cost: CostRecord | None
    cost_baseline: CostRecord | None
    sha256: Digest = "0" * 64

    @model_validator(mode="after")
    def _whole(self) -> EvalRecord:
        if not (self.texts or self.tasks or self.generation or self.cost):
            raise ValueError("a record without a single score")
        for names in ([text.data.name for text in self.texts], [task.name for task in self.tasks]):
            if len(set(names)) != len(names):
                raise ValueError("two texts or two tasks of one name")
        paired = [text.clusters.kl is not None for text in self.texts]
        paired += [task.correct_baseline is not None for task in self.tasks]
        paired += [] if self.generation is None else [self.generation.identical is not None]
        if any(has != (self.baseline is not None) for has in paired):
            raise ValueError("the baseline's columns belong to a record with a baseline, and only to it")
        if self.cost_baseline is not None and (self.baseline is None or self.cost is None):
            raise ValueError("a baseline's cost without a baseline or without the model's own")
        return self

    def text(self, name: str | None = None) -> TextRecord:
        """The text of that name, the first without a name. Raises IntegrityError where it was not scored."""
        for text in self.texts:
            if name in (None, text.data.name):
                return text
        wanted = "any text" if name is None else f"the text {name!r}"
        there = ", ".join(text.data.name for text in self.texts) or "none"
        raise IntegrityError(
            f"{self.model.name} was not scored on {wanted} (scored: {there})",
            "score it again with `compress eval`" + ("" if name is None else f", or with --data {name}"),
        )

    def task(self, name: str) -> TaskRecord:
        """The task of that name. Raises IntegrityError where it was not scored."""
        for task in self.tasks:
            if task.name == name:
                return task
        there = ", ".join(task.name for task in self.tasks) or "none"
        raise IntegrityError(
            f"{self.model.name} was not scored on the task {name!r} (scored: {there})",
            f"score it again with `compress eval --tasks {name}`, or with a suite that holds it",
        )

    def sealed(self) -> EvalRecord:
        """The same record with `sha256` set to the hash of all its other fields."""
        return self.model_copy(update={"sha256": self.expected_sha256()})

    def expected_sha256(self) -> str:
        """What `sha256` must be."""
        return sha256_json(self.model_dump(mode="json", exclude={"sha256"}))

    def to_bytes(self) -> bytes:
        """The file's bytes: JSON with one line per field and one per column of the texts and tasks."""
        return (_lines(self.model_dump(mode="json"), "") + "\n").encode()


def write_record(record: EvalRecord, path: str | Path) -> None:
    """Writes eval.json so that a reader sees the old file or the whole new one; raises WorkError where it cannot."""
    durable.write_atomic(Path(path), record.to_bytes())


def read_record(path: str | Path) -> EvalRecord:
    """The record in a file.

    Raises:
        UserError: there is no such file.
        IntegrityError: the file is truncated, was edited, or is no eval record of this version.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", "give the eval.json that `compress eval` wrote"
        ) from error
    return parse_record(data, str(path))


def parse_record(data: bytes, origin: str) -> EvalRecord:
    """The record in the bytes of an eval.json; `origin` names it in errors. Raises IntegrityError as `read_record`."""
    try:
        record = EvalRecord.model_validate_json(data)
    except ValidationError as error:
        version = _version(data)
        if isinstance(version, int) and version < SCHEMA_VERSION:
            raise IntegrityError(
                f"{origin} is an eval record of schema {version}, not {SCHEMA_VERSION}", _HINT
            ) from None
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        said = str(first.get("ctx", {}).get("error", first["msg"]))
        raise IntegrityError(
            f"{origin} is not a whole eval record (schema {SCHEMA_VERSION}): {where}: {said}", _HINT
        ) from None
    if record.sha256 != record.expected_sha256():
        raise IntegrityError(f"{origin} was edited: its sha256 is not that of its contents", _HINT)
    contradiction = _contradiction(record)
    if contradiction:
        raise IntegrityError(f"{origin} contradicts itself: {contradiction}", _HINT)
    return record


def _contradiction(record: EvalRecord) -> str | None:
    """The first number that does not follow from the columns beside it; None if all do."""
    for text in record.texts:
        stated = text.summary
        if not same_summary(stated, summarise(text.clusters, stated.kl_percentiles, stated.dp_percentiles)):
            return f"the summary of {text.data.name} does not follow from its sums"
    for task in record.tasks:
        for column, interval in ((task.correct, task.accuracy), (task.correct_baseline, task.accuracy_baseline)):
            if column is not None and interval is not None and not _is_mean(interval.estimate, column):
                return f"the accuracy on {task.name} does not follow from its items"
    generation = record.generation
    if generation is not None:
        for mean, values in (
            (generation.identical, generation.identical_per_prompt),
            (generation.first_difference_mean, generation.first_difference),
            (generation.degenerate, generation.degenerate_per_prompt),
        ):
            if mean is not None and values is not None and not _is_mean(mean, values):
                return "the summary of the generated answers does not follow from the answers"
    return None


def _is_mean(value: float, column: list[int]) -> bool:
    return math.isclose(value, sum(column) / len(column), rel_tol=1e-9, abs_tol=1e-12)


def _version(data: bytes) -> object:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value.get("schema_version") if isinstance(value, dict) else None


def _lines(value: object, indent: str, depth: int = 0) -> str:
    """JSON with the members of texts, tasks and their sums on lines of their own, everything else on one line."""
    inner = indent + " "
    if isinstance(value, dict) and (depth == 0 or depth == 2 or "nll" in value):
        rows = [f'{inner}"{key}": {_lines(item, inner, depth + 1)}' for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if depth == 1 and isinstance(value, list) and value:
        return "[\n" + ",\n".join(inner + _lines(item, inner, depth + 1) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
