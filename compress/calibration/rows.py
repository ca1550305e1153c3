"""Rows of text or of conversations, from JSONL, JSON and Parquet files and from data sets of the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from compress.errors import UserError

TEXT_COLUMNS = ("text", "content")
CHAT_COLUMNS = ("messages", "conversations")
HUB_ROWS = 10_000
"""Rows that are fetched of a data set of the hub, the first of its split: no more than windows are cut from."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_HINT = 'rows hold a string `text`, or `messages` as [{"role": "user", "content": "..."}, ...]'

Message = dict[str, str]


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """Documents as strings (`rows`) or conversations as messages (`chat`); `sha256` is over what was read."""

    kind: Literal["rows", "chat"]
    items: list[str] | list[list[Message]]
    sha256: str


def read_rows(path: Path) -> Rows:
    """The rows of a JSONL, JSON or Parquet file. Raises UserError for anything else in it."""
    raw = path.read_bytes()
    read = _parquet if path.suffix == ".parquet" else _json
    return _rows(read(raw, path), str(path), hashlib.sha256(raw).hexdigest())


def fetch_rows(name: str) -> Rows:
    """The first rows of a data set of the hub, `org/name`, `org/name/configuration`, either with `@split`.

    Raises UserError where it cannot be fetched.
    """
    from datasets import load_dataset

    place, _, split = name.partition("@")
    dataset, *config = place.rsplit("/", place.count("/") - 1)
    try:
        stream = load_dataset(dataset, *config, split=split or "train", streaming=True)
        found = list(islice(stream, HUB_ROWS))
    except Exception as error:  # the library raises many kinds, of the network, of the name and of the files
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"calibration text {name!r} is no file, and as a data set of the hub it could not be fetched: {cause}",
            "check the name (org/name, org/name/configuration, org/name@split) and the network, or give a file",
        ) from error
    spelled = json.dumps(found, sort_keys=True, ensure_ascii=True, default=str)
    return _rows(enumerate(found, 1), name, hashlib.sha256(spelled.encode()).hexdigest())


def decoded(raw: bytes, path: Path) -> str:
    """The text of a file's bytes. UserError where it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"calibration text {path} is not UTF-8 (byte {error.start})", "convert it to UTF-8 first"
        ) from None


def _json(raw: bytes, path: Path) -> Iterable[tuple[int, Any]]:
    text = decoded(raw, path)
    if path.suffix == ".json":
        whole = _parsed(text, f"{path} is not JSON")
        if not isinstance(whole, list):
            raise UserError(f"calibration text {path} is no JSON list of rows", _HINT)
        return enumerate(whole, 1)
    lines = enumerate(text.split("\n"), 1)
    return ((number, _parsed(line, f"{path}, line {number}: no JSON")) for number, line in lines if line.strip())


def _parsed(text: str, said: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"calibration text {said}", _HINT) from None


def _parquet(raw: bytes, path: Path) -> Iterable[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw))
        known = [name for name in (*CHAT_COLUMNS, *TEXT_COLUMNS) if name in file.schema_arrow.names]
        if not known:
            raise UserError(f"calibration text {path} has the columns {', '.join(file.schema_arrow.names)}", _HINT)
        return enumerate(file.read(columns=known[:1]).to_pylist(), 1)
    except pyarrow.ArrowException as error:
        raise UserError(f"calibration text {path} is no Parquet file: {error}", "write it again") from None


def _rows(rows: Iterable[tuple[int, Any]], where: str, sha256: str) -> Rows:
    """Checks every row; all must be of the kind of the first."""
    texts: list[str] = []
    chats: list[list[Message]] = []
    for number, row in rows:
        found = _item(row, f"calibration text {where}, row {number}")
        if isinstance(found, list):
            chats.append(found)
        elif found.strip():
            texts.append(found)
        if texts and chats:
            raise UserError(
                f"calibration text {where} mixes documents and conversations, from row {number} on",
                "put them in two files and give a mix: a.jsonl:0.5,b.jsonl:0.5",
            )
    if not texts and not chats:
        raise UserError(f"calibration text {where} is empty", _HINT)
    return Rows("chat", chats, sha256) if chats else Rows("rows", texts, sha256)


def _item(row: Any, where: str) -> str | list[Message]:
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is no JSON object", _HINT)
    for column in CHAT_COLUMNS:
        if isinstance(row.get(column), list):
            return [_message(message, where) for message in row[column]]
    for column in TEXT_COLUMNS:
        if isinstance(row.get(column), str):
            return str(row[column])
    keys = ", ".join(str(key) for key in row) or "nothing"
    raise UserError(f"{where} has neither a text nor messages, but {keys}", _HINT)


def _message(message: Any, where: str) -> Message:
    """One message; `from` and `value` are what conversations of the ShareGPT kind call role and content."""
    if isinstance(message, Mapping):
        role, said = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(said, str):
            return {"role": _ROLES.get(role, role), "content": said}
    raise UserError(f"{where} has a message without a role or without a text as its content", _HINT)
