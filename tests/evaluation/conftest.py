"""Tiny models, damaged copies of models, a text to score on, and one record that tests copy and change."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import content
from compress.evaluation.evaluate import evaluate
from compress.evaluation.records import EvalRecord
from compress.pipeline import run
from compress.recipe import Recipe
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama: byte-level tokenizer, context 64. Do not write to it."""
    return tiny_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20,000 characters of tales: 10 blocks for the tiny models."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    whole = content.eval_dir().joinpath("data", "tales_heldout.txt").read_text(encoding="utf-8")
    path.write_text(whole[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """rounded(model, bits, group): a copy whose block linears are rounded to nearest, kept dense."""

    def make(model: Path, bits: int, group: int = 32) -> Path:
        copy = tmp_path_factory.mktemp(f"rtn{bits}") / model.name
        shutil.copytree(model, copy)
        tensors = load_file(copy / "model.safetensors")
        for name, weight in tensors.items():
            if ".layers." in name and weight.ndim == 2:
                groups = weight.float().reshape(weight.shape[0], -1, group)
                scale = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
                codes = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                tensors[name] = (codes * scale).reshape(weight.shape).to(weight.dtype)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        return copy

    return make


@pytest.fixture(scope="session")
def damaged(tiny: Path, rounded: Callable[..., Path]) -> Path:
    """The tiny model at 4 bits."""
    return rounded(tiny, 4)


@pytest.fixture(scope="session")
def rtn() -> Recipe:
    """Rounding to 4 bits in groups that fit the tiny models."""
    return Recipe.model_validate(
        {"stages": [{"method": "rtn", "scheme": {"bits": 4, "group_size": 32}, "kind": "quantize"}]}
    )


@pytest.fixture(scope="session")
def _artifact(tiny: Path, rtn: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(rtn, model=tiny, output=tmp_path_factory.mktemp("artifacts") / "tiny-rtn" / "v1").artifact.path


@pytest.fixture
def artifact(_artifact: Path, tmp_path: Path) -> Path:
    """A private copy of a real artifact: the tiny model at 4 bits, not scored."""
    return Path(shutil.copytree(_artifact, tmp_path / "tiny-rtn" / "v1"))


@pytest.fixture(scope="session")
def record(tiny: Path, damaged: Path, text: Path) -> EvalRecord:
    """The damaged model scored against the tiny one."""
    return evaluate(damaged, tiny, data=text, device="cpu")
