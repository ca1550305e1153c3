"""What a search is for, on the packaged model: at every budget no scheme for all is better, on text it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress import content, pipeline
from compress.calibration.tokens import draw
from compress.recipe import parse_recipe
from compress.workflows.budget.divergence import divergence
from compress.workflows.budget.search import quantize_to_budget
from compress.workflows.budget.target import Target

CALIBRATION = {"source": "tales", "samples": 64, "seq_len": 512}
UNIFORM = {2.5: (2, 32), 3.0: (2, 16), 3.5: (3, 32), 4.25: (4, 64), 5.0: (4, 16)}
"""For every budget the uniform scheme of the most bits that fits it."""


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    """Windows of the packaged held-out text."""
    from transformers import AutoTokenizer

    model = content.default_model()
    text = content.eval_dir() / "data" / "tales_heldout.txt"
    tokenizer = AutoTokenizer.from_pretrained(model)
    return draw(str(text), tokenizer, samples=32, seq_len=512, seed=0, longest=512, vocabulary=4096).tokens


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set of measurements for all budgets."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("budget", UNIFORM)
def test_a_mixture_beats_one_scheme_for_all(
    budget: float, held_out: torch.Tensor, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(cache))
    model, stage = content.default_model(), {"method": "gptq", "calibration": CALIBRATION}
    found = quantize_to_budget(
        parse_recipe({"stages": [stage]}), Target("bits", budget), output=tmp_path / "mixed", evaluate=False
    )
    bits = found.made.artifact.manifest.sizes.bits_per_weight
    assert bits is not None
    assert 0.99 * budget <= bits <= budget
    width, size = UNIFORM[budget]
    uniform = parse_recipe({"stages": [{**stage, "scheme": {"bits": width, "group_size": size}}]})
    other = pipeline.run(uniform, output=tmp_path / "uniform").artifact
    assert divergence(model, found.made.artifact.path, held_out) < divergence(model, other.path, held_out)
