"""Scores of finished batches on disk, so that a killed evaluation of a text goes on where it was.

One small file per batch, written whole or not at all, in a directory named after everything that decides the numbers:
models, tokens, precision, device, versions. Numbers only; nothing in it is executed when it is read.
"""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.artifact import durable
from compress.artifact.canonical import sha256_json
from compress.evaluation.token_sums import TokenScores

_SECONDS = "seconds"


class KeptScores:
    """The batches of one evaluation of one text. Raises WorkError where its directory cannot be written."""

    def __init__(self, directory: Path, key: dict[str, Any]) -> None:
        """directory: where evaluations are kept. key: everything that decides the scores, as plain data."""
        self._directory = directory / "texts" / sha256_json(key)[:32]
        with durable.guarded("create", self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)

    def get(self, index: int, tokens: int) -> tuple[TokenScores, float] | None:
        """The scores of a batch of so many scored tokens, and the candidate's seconds; None if missing or damaged."""
        try:
            with np.load(self._path(index), allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
            seconds = float(columns.pop(_SECONDS))
            scores = TokenScores(**{name: torch.from_numpy(values) for name, values in columns.items()})
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None
        return (scores, seconds) if all(len(values) == tokens for values in columns.values()) else None

    def put(self, index: int, scores: TokenScores, seconds: float) -> None:
        """Keeps the scores of a finished batch."""
        columns = {field.name: getattr(scores, field.name) for field in fields(TokenScores)}
        buffer = io.BytesIO()
        arrays = {name: values.numpy() for name, values in columns.items() if values is not None}
        np.savez(buffer, **arrays, seconds=np.float64(seconds))
        beside = self._directory / f".{index:06d}.{os.getpid()}.tmp"  # two processes may do the same evaluation
        durable.write_bytes(beside, buffer.getvalue())
        durable.rename(beside, self._path(index))

    def _path(self, index: int) -> Path:
        return self._directory / f"{index:06d}.npz"
