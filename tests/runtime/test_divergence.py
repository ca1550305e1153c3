"""How far the engine's predictions are from transformers' on the decoded weights, with outlier channels and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.outlier_twin import make_twin
from compress.content import calibration_dir
from compress.runtime import loading, transformers_backend
from tests.runtime.packed import fitting, write_packed

BARS = {"cpu": 1e-4, "cpu-int8": 2e-3}
"""KL in nats per token."""
TOKENS, WINDOW = 2_000, 100


@pytest.mark.parametrize("model", ["packaged", "twin"])
def test_divergence_is_within_its_bars(model: str, packaged_model: Path, tmp_path: Path) -> None:
    source = packaged_model
    if model == "twin":
        source = tmp_path / "twin"
        make_twin(packaged_model, source)
    packed, dense = write_packed(source, tmp_path, fitting(4, 128))
    reference = transformers_backend.load(dense, device="cpu")
    ids = reference.encode((calibration_dir() / "tales.txt").read_text(encoding="utf-8")[:20_000])
    tokens = torch.tensor(ids[:TOKENS]).reshape(-1, WINDOW)
    expected = reference.score(tokens).double().log_softmax(-1)
    found = {}
    for kernel in BARS:
        logprobs = loading.load(packed, device="cpu", kernel=kernel).score(tokens).double().log_softmax(-1)
        found[kernel] = float((expected.exp() * (expected - logprobs)).sum(-1).mean())
    assert found["cpu"] < 1e-8 < found["cpu-int8"]  # 8 bits are seen
    assert all(found[kernel] < bar for kernel, bar in BARS.items()), found
