"""The native module passes its tests under AddressSanitizer and UBSan, built apart as `make sanitize` builds it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# An array that claims more than its memory holds: no check of ours can know, and the sanitizer must.
OVERRUN = """
import ctypes
import numpy
from compress.kernels.cpu import _native
heap = ctypes.CDLL(None)
heap.malloc.restype = ctypes.c_void_p
block = heap.malloc(64)
class Lie:
    __array_interface__ = {"shape": (1, 64), "typestr": "<f4", "data": (block, False), "version": 3}
_native.pack_dense(numpy.asarray(Lie()), 0, None, 1)
print("not seen")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ and its sanitizers")
    return tmp_path_factory.mktemp("sanitized")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_native_module_under_sanitizers(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "sanitize.py"), "--build", str(built)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    assert " passed" in run.stdout

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import sanitize

    module = next(built.glob("_native*.so"))
    read = subprocess.run(
        [sys.executable, "-c", OVERRUN],
        env=sanitize.environment(module, built),
        capture_output=True,
        text=True,
        check=False,
    )
    assert read.returncode != 0
    assert "heap-buffer-overflow" in read.stderr
    assert "not seen" not in read.stdout
