"""`samples.jsonl.gz`: what each item of each task was answered, beside eval.json. One JSON object per line.

For people and other tools: which items flipped, and by how much. Gates decide on eval.json alone. Equal scores give
equal bytes: no time stamp and no file name is kept in the gzip header.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from compress.artifact import durable
from compress.errors import IntegrityError, UserError
from compress.evaluation.harness.scores import ItemScore, TaskScores

NAME = "samples.jsonl.gz"
_LEVEL = 6
_FIELDS = ("task", *(field.name for field in fields(ItemScore)))
_HINT = "score the model again with `compress eval`"


def to_bytes(tasks: Sequence[TaskScores]) -> bytes:
    """The file's bytes: the tasks in order, their items in order."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=_LEVEL, mtime=0) as file:
        for task in tasks:
            for item in task.items:
                line = {"task": task.name, **asdict(item)}
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())
                file.write(b"\n")
    return buffer.getvalue()


def write_samples(tasks: Sequence[TaskScores], path: str | Path) -> str:
    """Writes the file so that a reader sees the old one or the whole new one. Returns its SHA-256.

    Raises:
        WorkError: it cannot be written.
    """
    return durable.write_atomic(Path(path), to_bytes(tasks))


def read_samples(path: str | Path) -> dict[str, list[ItemScore]]:
    """The items of each task, in the order of the file.

    Raises:
        UserError: there is no such file.
        IntegrityError: it is truncated or damaged, or a line is no item.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", f"give the {NAME} that `compress eval` wrote"
        ) from error
    try:
        text = gzip.decompress(data).decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise IntegrityError(f"{path} is truncated or damaged: {error}", _HINT) from error
    if not data:
        raise IntegrityError(f"{path} is truncated: it is empty", _HINT)
    found: dict[str, list[ItemScore]] = {}
    for task, item in _items(text.splitlines(), str(path)):
        found.setdefault(task, []).append(item)
    return found


def _items(lines: Iterable[str], origin: str) -> Iterator[tuple[str, ItemScore]]:
    for number, line in enumerate(lines, 1):
        try:
            value: Any = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or set(value) != set(_FIELDS):
            raise IntegrityError(f"{origin}, line {number}: not an item's scores", _HINT)
        task = str(value.pop("task"))
        if value["choice_lls"] is not None:
            value["choice_lls"] = tuple(value["choice_lls"])
        yield task, ItemScore(**value)
