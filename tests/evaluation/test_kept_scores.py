"""A text's evaluation that was killed goes on where it was, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from compress.errors import WorkError
from compress.evaluation import metrics
from compress.evaluation.evaluate import evaluate
from compress.evaluation.kept_scores import KeptScores
from compress.evaluation.metrics import score
from compress.evaluation.windows import cut
from tests.evaluation.fakes import TableRuntime

DOCUMENTS = ["The quick brown fox jumps over the lazy dog. " * n for n in range(1, 41)]


class Killed(BaseException):
    """Stands for the end of the process."""


class Mortal(TableRuntime):
    """Dies after so many batches."""

    def __init__(self, lives: int, **options: Any) -> None:
        super().__init__(**options)
        self.lives = lives

    def score(self, token_ids: Tensor) -> Tensor:
        if len(self.batches) == self.lives:
            raise Killed
        return super().score(token_ids)


@pytest.mark.parametrize("alone", [False, True])
def test_a_killed_run_loses_only_the_batch_in_flight(alone: bool, tmp_path: Path) -> None:
    baseline = None if alone else TableRuntime(seed=2)
    windows = cut(DOCUMENTS, TableRuntime())
    whole = score(TableRuntime(seed=1), baseline, windows, batch_tokens=320)
    kept = KeptScores(tmp_path, {"a": 1})
    with pytest.raises(Killed):
        score(Mortal(7, seed=1), baseline, windows, batch_tokens=320, kept=kept)
    second = TableRuntime(seed=1)
    resumed = score(second, baseline, windows, batch_tokens=320, kept=KeptScores(tmp_path, {"a": 1}))
    assert len(second.batches) == -(-len(windows.tokens) // 10) - 7
    assert resumed.clusters == whole.clusters
    assert (resumed.kl_percentiles, resumed.dp_percentiles) == (whole.kl_percentiles, whole.dp_percentiles)
    assert resumed.seconds > 0


def test_another_key_finds_nothing(tmp_path: Path) -> None:
    windows = cut(DOCUMENTS, TableRuntime())
    score(TableRuntime(seed=1), None, windows, kept=KeptScores(tmp_path, {"a": 1}))
    runtime = TableRuntime(seed=1)
    score(runtime, None, windows, kept=KeptScores(tmp_path, {"a": 2}))
    assert runtime.batches


@pytest.mark.parametrize("damage", ["cut", "pickle", "empty", "columns", "length"])
def test_damaged_batches_are_computed_again(damage: str, tmp_path: Path) -> None:
    windows = cut(DOCUMENTS, TableRuntime())
    whole = score(TableRuntime(seed=1), None, windows, batch_tokens=320, kept=KeptScores(tmp_path, {}))
    first = min(tmp_path.rglob("*.npz"))
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-40])
    elif damage == "empty":
        first.write_bytes(b"")
    elif damage == "columns":
        np.savez(first, nll=np.zeros(3), other=np.zeros(3), seconds=np.float64(1))
    elif damage == "length":
        np.savez(first, nll=np.zeros(3), seconds=np.float64(1))
    else:
        np.savez(first, nll=np.array([object()], dtype=object), seconds=np.float64(1))
    runtime = TableRuntime(seed=1)
    again = score(runtime, None, windows, batch_tokens=320, kept=KeptScores(tmp_path, {}))
    assert len(runtime.batches) == 1
    assert again.clusters == whole.clusters


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("a file")
    with pytest.raises(WorkError, match="cannot create"):
        KeptScores(tmp_path, {})


def test_evaluate_goes_on_from_its_cache(
    tiny: Path, damaged: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": text, "device": "cpu", "batch_tokens": 640}
    fresh = evaluate(damaged, tiny, **options).text()
    compute, calls = metrics._batch, 0

    def mortal(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise Killed
        return compute(*arguments)

    monkeypatch.setattr(metrics, "_batch", mortal)
    with pytest.raises(Killed):
        evaluate(damaged, tiny, cache_dir=tmp_path, **options)
    resumed = evaluate(damaged, tiny, cache_dir=tmp_path, **options).text()
    assert calls == 20 + -(-fresh.data.windows // 10) - 19
    assert (resumed.clusters, resumed.summary) == (fresh.clusters, fresh.summary)
    evaluate(tiny, damaged, cache_dir=tmp_path, **options)
    assert calls == 20 + 2 * -(-fresh.data.windows // 10) - 19, "another pair of models shares nothing"
