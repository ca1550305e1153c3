"""Tiny checkpoints and their packed copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.runtime.native_backend import NativeRuntime
from tests.kernels.conftest import isa as isa  # a fixture here too
from tests.runtime.native import native
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(model_type, **overrides): a tiny model directory, made once per session; do not write to it."""
    made: dict[str, Path] = {}

    def make(model_type: str, **overrides: Any) -> Path:
        key = f"{model_type} {sorted(overrides.items())}"
        if key not in made:
            made[key] = tiny_model(model_type, tmp_path_factory.mktemp(model_type), **overrides)
        return made[key]

    return make


@pytest.fixture(scope="module")
def tales(packaged_model: Path) -> NativeRuntime:
    return native(packaged_model)


@pytest.fixture(scope="module")
def four_bits(packaged_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The packaged model in 4 bits, and the same with its weights decoded."""
    return write_packed(packaged_model, tmp_path_factory.mktemp("tales"), fitting(4, 128))
