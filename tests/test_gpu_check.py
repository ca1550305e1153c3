"""`make gpu-check`'s script runs to its end in the interpreter, and says what it needs where there is no GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_dry_run_computes_everything_and_times_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    result = gpu_check("--dry", "--json", str(tmp_path / "record.json"))
    assert result.returncode == 0, result.stderr[-4000:]
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["versions"]["triton"] != "not installed"
    parity, layer, engine = (record["sections"][name] for name in ("parity", "layer", "engine"))
    assert set(parity["products"]) == {name for name, row in layer["1"].items() if isinstance(row, dict)}
    assert set(parity["attention"]) == {"plain", "int8", "int4", "fp8"}
    assert all(0 < error < 0.06 for errors in parity["products"].values() for error in errors.values())
    assert all(row["time"] is None for row in layer["1"].values() if row is not None)
    assert engine["2"]["step"] == {"bfloat16": None, "W4A16-g128": None}
    assert engine["kernels"]["W4A16-g128"] == ["dense bfloat16", "triton w4a16-g128"]
    assert "interpreter" in record["device"]
    assert [bar["met"] for bar in record["bars"].values()] == [None] * 7 + [True] * 2


@pytest.fixture
def tool() -> ModuleType:
    pytest.importorskip("triton", reason="triton is not installed")
    return importlib.import_module("benchmarks.gpu_check")


def test_a_section_that_fails_is_recorded_and_the_others_run(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(shape: object, clock: object, found: dict[str, Any], save: Callable[[], None]) -> None:
        found["1"] = {}
        save()
        raise RuntimeError("no memory")

    def whole(shape: object, clock: object, found: dict[str, Any], save: Callable[[], None]) -> None:
        found["512"] = {"FP8_DYNAMIC": {"times_faster_than_bfloat16": {"median": 1.1, "least": 1.0, "most": 1.3}}}

    monkeypatch.setattr(tool, "SECTIONS", {"layer": broken, "fp8": whole})
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"sections": {"engine": {"of": "an earlier call"}}}))
    with pytest.raises(SystemExit) as ended:
        tool.main(["--dry", "--sections", "layer,fp8", "--json", str(path)])
    record = json.loads(path.read_text())
    assert record["sections"]["layer"]["error"] == "RuntimeError: no memory"
    assert record["sections"]["engine"] == {"of": "an earlier call"}
    bar = record["bars"]["FP8 layer at 512 tokens over bfloat16"]
    assert bar == {"figure": 1.1, "wanted": 1.2, "met": False, "spread": {"median": 1.1, "least": 1.0, "most": 1.3}}
    assert "error: layer: RuntimeError: no memory" in str(ended.value)
    assert "FP8 layer at 512 tokens over bfloat16 is 1.1, and 1.2 is wanted" in str(ended.value)
    assert "4-bit layer at 1 token over bfloat16 is not there" in str(ended.value)
    with pytest.raises(SystemExit):
        tool.main(["--dry", "--sections", "speed"])


def test_a_bar_is_missed_by_a_figure_below_it_and_by_nan(tool: ModuleType) -> None:
    sections = {
        "parity": {"products": {"W8A8": {"1": 0.01, "2": float("nan")}}, "attention": {"int8": {"chunk": 0.04}}}
    }
    assert [bar["met"] for bar in tool.bars(sections).values()] == [False, False]
    sections["parity"]["products"]["W8A8"]["2"] = 0.02
    assert tool.bars(sections)["error of products"]["met"] is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    result = gpu_check("--require-gpu")
    assert result.returncode != 0
    assert "no CUDA device" in result.stderr
    assert "--dry" in result.stderr
