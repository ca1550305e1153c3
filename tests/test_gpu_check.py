"""`make gpu-check`'s script runs to its end in the interpreter, and says what it needs where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
    assert set(record["parity"]) == set(record["layer"]["1"]) - {"bfloat16"}
    assert all(0 < error < 0.06 for errors in record["parity"].values() for error in errors.values())
    assert record["copy_bytes_per_second"] is None
    assert all(row["time"] is None for name, row in record["layer"]["1"].items() if name != "bfloat16")
    assert record["engine"]["2"]["W4A16-g128"] is None
    assert record["engine"]["kernels"]["W4A16-g128"] == ["dense bfloat16", "triton w4a16-g128"]
    assert "interpreter" in record["device"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    result = gpu_check("--require-gpu")
    assert result.returncode != 0
    assert "no CUDA device" in result.stderr
    assert "--dry" in result.stderr
