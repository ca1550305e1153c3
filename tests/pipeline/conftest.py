"""Tiny models, a calibration text, and one thread, so that runs are short and machines alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.pipeline.harness import write_text
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(model_type, **overrides): a read-only tiny model directory, made once per session."""
    transformers.logging.disable_progress_bar()
    made: dict[str, Path] = {}

    def make(model_type: str, **overrides: Any) -> Path:
        key = f"{model_type} {sorted(overrides.items())}"
        if key not in made:
            made[key] = tiny_model(model_type, tmp_path_factory.mktemp(model_type), **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text that the tiny tokenizers cut into some hundred windows."""
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")
