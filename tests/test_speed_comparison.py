"""The comparison with llama.cpp, with a llama.cpp that answers known rates and a tiny model of ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import machine, vs_llama_cpp
from benchmarks.speed_worker import native
from benchmarks.vs_llama_cpp import Case
from compress.content import default_model


class FixedWorker:
    """Stands for a loaded model of ours with a rate known beforehand."""

    facts = {"kernels": ["none"], "bytes_per_token": 10_000_000}  # noqa: RUF012

    def __init__(self, *_: object) -> None:
        pass

    def rate(self, _case: Case, threads: int) -> float:
        return 30.0 * threads

    def rate_and_bandwidth(self, case: Case) -> tuple[float, dict[str, float]]:
        return 30.0 * case.threads, {"read_gb_s": 0.5, "usual_gb_s": 0.4}


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    for name, answer in (
        ("llama-bench", {"samples_ts": [1.0, 20.0], "model_size": 7}),
        ("llama-batched-bench", {"speed_tg": 12.0}),
    ):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho noise\necho '{json.dumps(answer)}'\n")
        path.chmod(0o755)
    (tmp_path / "tiny-Q4_0.gguf").write_bytes(b"1234")
    monkeypatch.setattr(vs_llama_cpp, "Worker", FixedWorker)
    monkeypatch.setattr(machine, "wait_until_quiet", lambda *_args, **_kwargs: 0.0)
    return argparse.Namespace(llama=tmp_path, models=tmp_path, rounds=3, patience=0.0)


def test_ratios_are_ours_over_theirs(arguments: argparse.Namespace) -> None:
    alone = vs_llama_cpp.run(Case("alone", "tiny-w4", ("Q4_0",), 1.3, 1), arguments, {})
    assert alone["rates"] == {"compress": 30.0, "Q4_0": 20.0}
    assert alone["ratio"] == alone["ratio_least"] == alone["ratio_greatest"] == 1.5
    assert alone["share_of_bandwidth"] == pytest.approx(30 * 0.01 / 0.5)
    assert alone["share_of_usual_bandwidth"] == pytest.approx(30 * 0.01 / 0.4)
    assert "60.0%, 75.0%" in vs_llama_cpp.row(alone)
    together = vs_llama_cpp.run(Case("batch", "tiny-w4", ("Q4_0",), 2.0, 2, batch=4), arguments, {})
    assert together["ratio"] == 60 / 12
    assert "share_of_bandwidth" not in together
    assert "read_gb_s" not in together["rounds"][0]


def test_a_round_with_a_neighbour_does_not_count(
    arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = iter([0.0, 1.0, 0.0])
    monkeypatch.setattr(machine, "wait_until_quiet", lambda *_args, **_kwargs: next(busy))
    monkeypatch.setattr(machine, "busy_seconds", lambda: 0.0)
    result = vs_llama_cpp.run(Case("alone", "tiny-w4", ("Q4_0",), 1.3, 1), arguments, {})
    assert result["undisturbed"] == 2
    assert [r["disturbed"] for r in result["rounds"]] == [False, True, False]


def test_the_worker_times_the_native_engine() -> None:
    timed, facts = native(str(default_model()), "cpu")
    assert facts["bytes_per_token"] > 0
    assert timed(1, 40, 0) > 0  # a prompt
    assert timed(3, 0, 35) > 0  # three sequences, over the end of a page
