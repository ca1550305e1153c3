"""How data files become the rows that task definitions speak of."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.errors import IntegrityError

Row = dict[str, Any]


def jsonl(file: Path) -> list[Row]:
    """One row per line. Raises IntegrityError for a line that is no JSON object."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise IntegrityError(f"{file}, line {number}: not a JSON object", "restore the file from its source")
        found.append(row)
    return found


def read_jsonl(test: Path, train: Path | None) -> list[Row]:
    """The test file's rows as they are."""
    return jsonl(test)


def read_truthfulqa(test: Path, train: Path | None) -> list[Row]:
    """TruthfulQA's CSV as single-answer questions: the best answer first, then the incorrect ones."""
    with test.open(encoding="utf-8", newline="") as file:
        return [
            {
                "question": row["Question"],
                "category": row["Category"],
                "choices": [row["Best Answer"], *filter(None, map(str.strip, row["Incorrect Answers"].split(";")))],
            }
            for row in csv.DictReader(file)
        ]


def read_mmlu(test: Path, train: Path | None) -> list[Row]:
    """MMLU with each subject's five development questions as `shots`, answered, before its test questions."""
    shots: dict[str, str] = {}
    for row in jsonl(train) if train is not None else []:
        answer = "ABCD"[row["answer"]]
        shots[row["subject"]] = shots.get(row["subject"], "") + f"{_mmlu_question(row)} {answer}\n\n"
    return [
        {
            "subject": row["subject"],
            "topic": row["subject"].replace("_", " "),
            "shots": shots.get(row["subject"], ""),
            "asked": _mmlu_question(row),
            "answer": row["answer"],
        }
        for row in jsonl(test)
    ]


def _mmlu_question(row: Row) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}\n{choices}Answer:"


READERS: dict[str, Callable[[Path, Path | None], list[Row]]] = {
    "jsonl": read_jsonl,
    "truthfulqa": read_truthfulqa,
    "mmlu": read_mmlu,
}
"""By the name that a definition gives under `data.reader`."""
