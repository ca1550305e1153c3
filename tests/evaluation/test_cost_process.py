"""The fresh process: memory against the weights that were loaded, errors passed on, a child that dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import UserError, WorkError
from compress.evaluation.costs.process import Fresh, Job, in_fresh_process, resident_bytes
from compress.runtime.transformers_backend import load


@pytest.mark.skipif(sys.platform != "linux", reason="host anonymous memory is read from /proc")
def test_memory_held_is_the_weights(packaged_model: Path) -> None:
    """In float32 they are copies; in the dtype of the files they stay mapped."""
    weights = load(packaged_model, device="cpu").parameters()
    slack = 12_000_000
    copied, mapped = (
        in_fresh_process(Job(str(packaged_model), "cpu", dtype, "reference", 1, "once", 8, 2, (1,), 1))
        for dtype in ("float32", "bfloat16")
    )
    assert None not in (copied.held_bytes, copied.peak_bytes, mapped.held_bytes, mapped.mapped_bytes)
    assert 4 * weights < (copied.held_bytes or 0) < 4 * weights + slack
    assert (copied.peak_bytes or 0) >= (copied.held_bytes or 0)
    assert 2 * weights < (mapped.held_bytes or 0) + (mapped.mapped_bytes or 0) < 2 * weights + slack
    assert (mapped.held_bytes or 0) < weights


@pytest.mark.skipif(sys.platform != "linux", reason="host anonymous memory is read from /proc")
def test_the_native_engine_keeps_weights_as_they_are_stored(packaged_model: Path) -> None:
    weights = load(packaged_model, device="cpu").parameters()
    held = in_fresh_process(Job(str(packaged_model), "cpu", "float32", "cpu", 1, "once", 8, 2, (1,), 1)).held_bytes
    assert 2 * weights < (held or 0) < 2 * weights + 12_000_000


def test_the_fresh_process_passes_errors_on(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(str(tmp_path / "nothing"), "cpu", "float32", "auto", 1, "once", 8, 2, (1,), 1)
    with pytest.raises(UserError, match="nothing"):
        in_fresh_process(job)
    monkeypatch.setattr("compress.evaluation.costs.process._ENTRY", "import sys; sys.exit('no luck')")
    with pytest.raises(WorkError, match="no luck"):
        in_fresh_process(job)


def test_the_fresh_process_ends_with_its_time(packaged_model: Path) -> None:
    job = Job(str(packaged_model), "cpu", "float32", "cpu", 1, "once", 8, 2, (1,), 1)
    assert in_fresh_process(job, 0.01) == Fresh([], None, None, None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_anonymous_memory_of_a_process_that_is_gone_is_unknown() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert resident_bytes(child.pid) is None
