"""Greedy answers on disk, one file each, so that a killed evaluation does not generate them again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifact import durable
from compress.artifact.canonical import sha256_json
from compress.runtime.protocol import Runtime, SamplingParams


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model made of a prompt."""

    text: str
    token_ids: tuple[int, ...]


class Answering:
    """A model that answers prompts, each one from `directory` if it was answered there before.

    identity: everything besides the prompt that decides an answer, as plain data. Nothing is kept without a directory.
    Raises WorkError where the directory cannot be written.
    """

    def __init__(self, runtime: Runtime, directory: Path | None = None, identity: dict[str, Any] | None = None) -> None:
        self._runtime = runtime
        self._directory = None
        if directory is not None:
            self._directory = directory / "answers" / sha256_json(identity or {})[:32]
            with durable.guarded("create", self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)

    def answer(self, prompt: str, params: SamplingParams) -> Answer:
        """The model's answer; raises as `Runtime.generate` does."""
        name = sha256_json([prompt, params.max_tokens])[:32]
        found = None if self._directory is None else _read(self._directory / f"{name}.json")
        if found is not None:
            return found
        (given,) = self._runtime.generate([prompt], params)
        fresh = Answer(given.text, given.token_ids)
        if self._directory is not None:
            value = {"text": fresh.text, "token_ids": fresh.token_ids}
            beside = self._directory / f".{name}.{os.getpid()}.tmp"  # two processes may do the same evaluation
            durable.write_bytes(beside, json.dumps(value).encode())
            durable.rename(beside, self._directory / f"{name}.json")
        return fresh


def _read(path: Path) -> Answer | None:
    """The answer in a file; None where it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
        text, token_ids = value["text"], value["token_ids"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(text, str) and isinstance(token_ids, list) and all(isinstance(token, int) for token in token_ids):
        return Answer(text, tuple(token_ids))
    return None
