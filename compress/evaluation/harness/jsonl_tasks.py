"""The user's own evaluation as a JSONL file: one prompt with its reference, or its choices, per line.

    {"settings": {"match": "contains", "max_tokens": 32, "stop": ["\\n"]}}          optional first line
    {"prompt": "The capital of France is", "reference": "Paris"}
    {"prompt": "2 + 2 =", "reference": ["4", "four"], "match": "exact", "id": "sum-1", "cluster": "sums"}
    {"prompt": "The sky is", "choices": ["blue", "made of cheese"], "reference": 0}

Answers are generated greedily and matched (`exact`, `contains` or `regex`), or judged by `scorer`, a Python function,
which is executed only under --trust-code. Lines with `choices` are scored by the log-likelihood of each; a file holds
one kind or the other.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.artifact.canonical import sha256_file, sha256_json
from compress.errors import UserError
from compress.evaluation.harness import matching, selection
from compress.evaluation.harness.matching import Match
from compress.evaluation.harness.resolved import Resolved, inline_dataset, reading_problem
from compress.evaluation.suites import SuiteTask
from compress.recipe_problems import describe

_HINT = "see `compress eval --help` for the form of a task file"
_MEAN = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Settings(_Strict):
    """What holds for all lines. `stop`: strings that end an answer."""

    match: Match = "exact"
    ignore_case: bool = False
    max_tokens: int = Field(default=64, ge=1)
    stop: list[str] = ["\n"]
    scorer: str | None = None


class Line(_Strict):
    """One item. `reference`: the right text or texts; with `choices`, the right one or its index."""

    prompt: str
    reference: str | list[str] | int | None = None
    choices: list[str] | None = Field(default=None, min_length=2)
    match: Match | None = None
    id: str | None = None
    cluster: str | None = None


def resolve_jsonl(task: SuiteTask, *, trust_code: bool) -> Resolved:
    """A task file with its chosen items.

    Raises:
        UserError: it cannot be read, a line is not as it should be, more items are asked for than there are, or it
            names a scorer without `trust_code`.
    """
    path = Path(task.name)
    settings, lines = _read(path)
    kinds = {line.choices is not None for _, line in lines}
    if len(kinds) > 1:
        raise UserError(f"{path} mixes lines with choices and lines without", "make two files of it")
    chooses = kinds.pop()
    if chooses and settings.scorer is not None:
        raise UserError(f"{path} has choices, which need no scorer", "leave the scorer out")
    rows: dict[str, dict[str, Any]] = {}
    for place, (number, line) in enumerate(lines):
        item_id = line.id or selection.item_id(place)
        if item_id in rows:
            raise UserError(f"{path}, line {number}: the id {item_id!r} occurs twice", _HINT)
        where = f"{path}, line {number}"
        rows[item_id] = _choice_row(line, where) if chooses else _answer_row(line, settings, where)
    chosen = _choose(rows, task, path)
    scorer = None if settings.scorer is None else _scorer(settings.scorer, path, trust_code)
    exact = scorer is None and not chooses and all(row["match"] == "exact" for row in chosen.values())
    config = _choice_config() if chooses else _answer_config(settings, scorer)
    identity = {"jsonl": settings.model_dump(), "scorer": None if scorer is None else scorer[1]}
    return Resolved(
        name=path.stem,
        config={**config, "task": path.stem, **inline_dataset(list(chosen.values()))},
        config_sha256=sha256_json(identity),
        metric="exact_match" if exact else "acc",
        rows=chosen,
        cluster="cluster" if all(row["cluster"] for row in chosen.values()) else None,
        user=True,
    )


def _read(path: Path) -> tuple[Settings, list[tuple[int, Line]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the task file {path}: {reading_problem(error)}", _HINT) from error
    settings = Settings()
    lines: list[tuple[int, Line]] = []
    for number, raw in enumerate(text.split("\n"), 1):
        if not raw.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(raw)
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}", _HINT) from error
        if isinstance(value, dict) and set(value) == {"settings"} and not lines:
            settings = _parsed(Settings, value["settings"], where)
        else:
            lines.append((number, _parsed(Line, value, where)))
    if not lines:
        raise UserError(f"the task file {path} has no items", _HINT)
    return settings, lines


def _parsed(model: Any, value: Any, where: str) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{where}: {'; '.join(describe(error, model))}", _HINT) from None


def _choice_row(line: Line, where: str) -> dict[str, Any]:
    choices = line.choices or []
    if any(not choice.strip() for choice in choices) or len(set(choices)) < len(choices):
        raise UserError(f"{where}: choices must be texts that differ", _HINT)
    gold = line.reference
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(choices) or line.match is not None:
        raise UserError(f"{where}: `reference` must be a choice or its index, and `match` has no place", _HINT)
    space = "" if not line.prompt or line.prompt[-1].isspace() else " "
    return {
        "prompt": line.prompt,
        "choices": [space + choice for choice in choices],
        "gold": gold,
        "cluster": line.cluster or "",
    }


def _answer_row(line: Line, settings: Settings, where: str) -> dict[str, Any]:
    match = line.match or settings.match
    given = line.reference
    if isinstance(given, int) or (given is None and settings.scorer is None) or given in ("", []):
        raise UserError(f"{where}: `reference` must be a text or a list of texts", _HINT)
    references = [given] if isinstance(given, str) else list(given or [])
    if not line.prompt:
        raise UserError(f"{where}: the prompt is empty", _HINT)
    if "" in references:
        raise UserError(f"{where}: an empty reference is found in every answer", "leave it out")
    if match == "regex":
        for pattern in references:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}: {pattern!r} is no regular expression: {error}", _HINT) from error
    return {
        "prompt": line.prompt,
        "references": references,
        "match": match,
        "cluster": line.cluster or "",
        "item": json.dumps(line.model_dump(exclude_none=True), sort_keys=True, ensure_ascii=False),
    }


def _choose(rows: dict[str, dict[str, Any]], task: SuiteTask, path: Path) -> dict[str, dict[str, Any]]:
    ids = sorted(rows)
    if task.items is not None and task.items > len(ids):
        raise UserError(f"{path} has {len(ids)} items, not {task.items}", "ask for fewer, or leave the number out")
    order = selection.order([rows[item_id]["cluster"] for item_id in ids], task.seed, path.stem)
    return {ids[number]: rows[ids[number]] for number in sorted(order[: task.items])}


def _scorer(spec: str, path: Path, trust_code: bool) -> tuple[matching.Scorer, str]:
    if not trust_code:
        raise UserError(f"{path} names the Python scorer {spec!r}", "allow it to be executed with --trust-code")
    function, file = matching.load_scorer(spec, path.parent)
    return function, f"{spec}:{sha256_file(file)}"


def _choice_config() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [_MEAN],
    }


def _answer_config(settings: Settings, scorer: tuple[matching.Scorer, str] | None) -> dict[str, Any]:
    judge = matching.by_rule(settings.ignore_case) if scorer is None else matching.by_function(scorer[0], scorer[1])
    return {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "",
        "generation_kwargs": {"until": settings.stop, "do_sample": False, "max_gen_toks": settings.max_tokens},
        "process_results": judge,
        "metric_list": [_MEAN],
    }
