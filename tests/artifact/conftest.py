"""Fixtures of the artifact tests: a tokenizer file to carry along, and a finished artifact to copy and damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.artifact import producer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json that runs copy into their artifact."""
    path = tmp_path_factory.mktemp("source") / "tokenizer.json"
    path.write_text('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}}\n')
    return path


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return producer.run(tmp_path_factory.mktemp("finished") / "tiny", tokenizer).artifact.path


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A private copy of a finished artifact (several shards) that verifies."""
    return Path(shutil.copytree(_finished, tmp_path / "finished" / "tiny"))


@pytest.fixture
def produce(tokenizer: Path) -> Callable[..., producer.Outcome]:
    """produce(output, **options): run the fake pipeline."""

    def call(output: Path, **options: object) -> producer.Outcome:
        return producer.run(output, tokenizer, **options)  # type: ignore[arg-type]

    return call
