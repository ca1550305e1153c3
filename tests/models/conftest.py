"""Tiny checkpoints, written once per session, and ways to damage or rewrite a copy of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_model

Rewrite = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


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
    made: dict[str, Path] = {}

    def make(model_type: str, **overrides: Any) -> Path:
        key = f"{model_type} {sorted(overrides.items())}"
        if key not in made:
            made[key] = tiny_model(model_type, tmp_path_factory.mktemp(model_type), **overrides)
        return made[key]

    return make


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[[Path, Rewrite], Path]:
    """rewritten(directory, change): a copy of a model directory whose tensors `change` maps to others."""

    def rewrite(directory: Path, change: Rewrite) -> Path:
        copy = tmp_path / "rewritten"
        shutil.copytree(directory, copy)
        save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors", {"format": "pt"})
        return copy

    return rewrite


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a tiny Llama to damage."""
    return shutil.copytree(tiny("llama"), tmp_path / "model")


@pytest.fixture
def sharded(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """The same model in several shards with an index."""
    AutoModelForCausalLM.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"
