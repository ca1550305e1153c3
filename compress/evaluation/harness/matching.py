"""Whether a generated answer is right by the user's own rule: exact, contains, regex, or a Python function."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from compress.errors import UserError, WorkError

Match = Literal["exact", "contains", "regex"]
Scorer = Callable[[str, str, dict[str, Any]], Any]
"""scorer(prompt, answer, item) -> True or 1 where the answer is right, False or 0 where it is not."""


def is_right(answer: str, references: list[str], match: Match, ignore_case: bool) -> bool:
    """Whether one of the references is the answer (white space at its ends aside), is in it, or is found in it."""
    if match == "regex":
        flags = re.IGNORECASE if ignore_case else 0
        return any(re.search(pattern, answer, flags) for pattern in references)
    if ignore_case:
        answer, references = answer.casefold(), [reference.casefold() for reference in references]
    if match == "contains":
        return any(reference in answer for reference in references)
    return answer.strip() in [reference.strip() for reference in references]


def by_rule(ignore_case: bool) -> Callable[[Mapping[str, Any], list[Any]], dict[str, int]]:
    """lm-eval's `process_results` for rows of a JSONL task."""

    def process(doc: Mapping[str, Any], results: list[Any]) -> dict[str, int]:
        return {"acc": int(is_right(str(results[0]), list(doc["references"]), doc["match"], ignore_case))}

    return process


def by_function(scorer: Scorer, origin: str) -> Callable[[Mapping[str, Any], list[Any]], dict[str, int]]:
    """lm-eval's `process_results` with the user's own function; `origin` names it in errors."""

    def process(doc: Mapping[str, Any], results: list[Any]) -> dict[str, int]:
        try:
            value = scorer(doc["prompt"], str(results[0]), json.loads(doc["item"]))
        except Exception as error:
            raise WorkError(
                f"the scorer {origin} failed: {type(error).__name__}: {error}", "mend the scorer"
            ) from error
        if value not in (0, 1):
            raise WorkError(f"the scorer {origin} gave {value!r}", "return True or False")
        return {"acc": int(value)}

    return process


def load_scorer(spec: str, directory: Path) -> tuple[Scorer, Path]:
    """The function that `file.py:name` names, its file looked for in `directory`. Executes the file.

    Raises:
        UserError: no such file or function, or the file fails.
    """
    path, _, name = spec.rpartition(":")
    file = directory / path
    if not path or not name.isidentifier() or not file.is_file():
        raise UserError(f"there is no scorer {spec!r} in {directory}", "write it as file.py:function")
    loader = importlib.util.spec_from_file_location(f"compress_scorer_{file.stem}", file)
    if loader is None or loader.loader is None:
        raise UserError(f"{file} is no Python file", "write the scorer as file.py:function")
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"the scorer {file} cannot be loaded: {type(error).__name__}: {error}", "mend it") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{file} has no function {name}", "write the scorer as file.py:function")
    return function, file
