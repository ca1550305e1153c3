"""Every kernel compiled ahead of time for the GPUs of three generations; what registers spill is reported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[3]
FEWEST = {"gemv": 66, "gemm": 129, "rounded": 9, "dense": 3, "round ": 4, "gate": 6, "norm": 2, "turn": 4,
          "attention": 36, "paged": 72, "write": 32, "join": 2, "finish": 1}  # fmt: skip


@pytest.mark.parametrize("kernels", FEWEST)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability: int, kernels: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_compile", "--capability", str(capability), "--only", kernels],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    with capsys.disabled():
        print("", result.stdout, sep="\n")
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count(f"sm_{capability}") >= FEWEST[kernels]
