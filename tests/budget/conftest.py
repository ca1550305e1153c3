"""A tiny model and a text for searches, one thread, and a cache of the tests' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.recipe import Recipe, parse_recipe
from tests.pipeline.harness import write_text
from tests.tiny_models import tiny_model

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    transformers.logging.disable_progress_bar()
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose widths 32 and 64 divide."""
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16, **SHAPE)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of some hundred windows."""
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def recipe(text: Path) -> Callable[..., Recipe]:
    """recipe(**stage): GPTQ on a few windows of that text."""

    def make(**stage: Any) -> Recipe:
        calibration = {"source": str(text), "samples": 8, "seq_len": 24}
        return parse_recipe({"stages": [{"method": "gptq", "calibration": calibration, **stage}]})

    return make
