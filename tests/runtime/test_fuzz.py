"""Damaged checkpoints end in a clear error or an answer, and never take the process with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import pipeline
from compress.schemes import FIXED_SCHEMES
from tests.pipeline import harness
from tests.runtime.packed import fitting, write_packed


def survived(model: Path, work: Path, first: int, last: int) -> None:
    command = [sys.executable, "-m", "tests.runtime.fuzz", str(model), str(work), str(first), str(last)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert run.returncode == 0, f"{run.stdout[-300:]}\n{run.stderr[-3000:]}"
    lines = run.stdout.splitlines()
    assert len(lines) == last - first
    assert any(line.endswith("IntegrityError") for line in lines)


@pytest.fixture
def packed(packaged_model: Path, tmp_path: Path) -> Path:
    return write_packed(packaged_model, tmp_path / "base", fitting(4, 128))[0]


def test_damaged_checkpoints(packed: Path, tmp_path: Path) -> None:
    survived(packed, tmp_path, 0, 12)


def test_damaged_tables(packaged_model: Path, tmp_path: Path) -> None:
    survived(write_packed(packaged_model, tmp_path / "base", fitting(6, 128), outside=True)[0], tmp_path, 300, 308)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "qwen3_moe"])
def test_many_damaged_checkpoints_of_other_families(model_type: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    survived(write_packed(tiny(model_type), tmp_path / "base", fitting(4, 32))[0], tmp_path, 0, 200)


@pytest.mark.slow
def test_many_damaged_checkpoints(packed: Path, tmp_path: Path) -> None:
    survived(packed, tmp_path, 12, 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIXED_SCHEMES))
def test_damaged_checkpoints_of_every_format(name: str, packaged_model: Path, tmp_path: Path) -> None:
    method = "ternary" if name == "W2A8" else "rtn"
    recipe = harness.recipe(method, harness.write_text(tmp_path / "text.txt"), scheme=name)
    survived(pipeline.run(recipe, model=packaged_model, output=tmp_path / "base").artifact.path, tmp_path, 0, 40)
