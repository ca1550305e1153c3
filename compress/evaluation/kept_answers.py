"""Greedy answers on disk, one file each, so that a killed evaluation does not generate them again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifact import durable
from compress.artifact.canonical import sha256_json
from compress.evaluation.together import in_groups
from compress.progress import Progress
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

    def answers(self, prompts: Sequence[str], params: SamplingParams, progress: Progress) -> list[Answer]:
        """The model's answers in order; raises as `Runtime.generate` does. progress: a step for each."""
        found = [self._kept(prompt, params) for prompt in prompts]
        missing = [number for number, answer in enumerate(found) if answer is None]
        for _ in range(len(prompts) - len(missing)):
            progress.advance()
        for numbers in in_groups(missing, self._runtime):
            given = self._runtime.generate([prompts[number] for number in numbers], params)
            for number, answer in zip(numbers, given, strict=True):
                found[number] = self._keep(prompts[number], params, Answer(answer.text, answer.token_ids))
                progress.advance()
        return [answer for answer in found if answer is not None]

    def _kept(self, prompt: str, params: SamplingParams) -> Answer | None:
        return None if self._directory is None else _read(self._directory / f"{_name(prompt, params)}.json")

    def _keep(self, prompt: str, params: SamplingParams, answer: Answer) -> Answer:
        if self._directory is not None:
            name, value = _name(prompt, params), {"text": answer.text, "token_ids": answer.token_ids}
            beside = self._directory / f".{name}.{os.getpid()}.tmp"  # two processes may do the same evaluation
            durable.write_bytes(beside, json.dumps(value).encode())
            durable.rename(beside, self._directory / f"{name}.json")
        return answer


def _name(prompt: str, params: SamplingParams) -> str:
    return sha256_json([prompt, params.max_tokens])[:32]


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
