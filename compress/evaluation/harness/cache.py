"""What a model answered, kept on disk batch by batch, so that a killed evaluation goes on where it was.

One append-only file per model and circumstances, its name the hash of all that decides an answer besides the request;
so two models never share one. An entry's key hashes the tokens of the whole batch, because what transformers computes
together decides its last bits: a resumed run gives exactly what an uninterrupted one gives. A batch is written in one
piece and is on disk before the next begins. A line that a crash cut short fails its checksum and is as if it were not
there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import compress
from compress.artifact import durable
from compress.artifact.canonical import sha256_json

_VERSIONS = ("lm-eval", "torch", "transformers", "tokenizers")
_CHECK_DIGITS = 16


class ResponseCache:
    """Answers of one model under fixed circumstances.

    Raises:
        WorkError: the directory or its file cannot be read or written.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, Any]) -> None:
        """directory: where caches are kept. identity: all that decides an answer besides the request, as plain data:
        the model's digest above all, then the runtime, kernel, dtype, device, threads and context length."""
        versions = {name: metadata.version(name) for name in _VERSIONS}
        self.identity = {**identity, "versions": {"compress": compress.__version__, **versions}}
        self.path = Path(directory) / "tasks" / f"{sha256_json(self.identity)[:32]}.jsonl"
        self._entries: dict[str, Any] = {}
        self._open()

    def get(self, request: Any) -> Any | None:
        """The answers to a batch of requests (plain data that names every token); None where there are none."""
        return self._entries.get(sha256_json(request))

    def put(self, request: Any, answers: Any) -> None:
        """Keeps the answers to a batch of requests, on disk when this returns."""
        key = sha256_json(request)
        durable.append_line(self.path, _line({"key": key, "answers": answers}))
        self._entries[key] = answers

    def _open(self) -> None:
        with durable.guarded("open", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            text = b"" if new else self.path.read_bytes()
            if new:
                self.path.touch()
        if new:
            durable.fsync_dir(self.path.parent)
        if text and not text.endswith(b"\n"):
            durable.append_line(self.path, b"")  # ends the line that a crash cut short
        if not text.strip():
            durable.append_line(self.path, _line({"identity": self.identity}))
        for line in text.split(b"\n"):
            entry = _entry(line)
            if entry is not None and "key" in entry:
                self._entries[entry["key"]] = entry["answers"]


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps({**value, "check": sha256_json(value)[:_CHECK_DIGITS]}, allow_nan=False).encode()


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry of a line; None where the line is cut short, damaged, or empty."""
    try:
        value = json.loads(line)
        check = value.pop("check")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return value if check == sha256_json(value)[:_CHECK_DIGITS] else None
