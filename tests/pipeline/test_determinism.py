"""The same recipe, source and seed give the same bytes, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress import pipeline
from compress.artifact.reader import Artifact
from compress.pipeline import inputs
from compress.recipe import load_recipe
from tests.pipeline import harness
from tests.pipeline.harness import CALIBRATED, METHODS, recipe

# Wider than a tile of rows and a panel of columns, so that there is work to share out.
WIDE = {"hidden_size": 160, "intermediate_size": 288, "num_attention_heads": 10, "num_key_value_heads": 5}
CASES = [("llama", method) for method in METHODS]
CASES += [(family, method) for family in ("llama in bfloat16", "gpt2", "mixtral") for method in CALIBRATED]


@pytest.fixture
def make(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Artifact]:
    """make(family, method, threads, **settings): made with so many threads, from several chunks of tokens."""
    monkeypatch.setattr(inputs, "CHUNK_TOKENS", 64)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    count = 0

    def made(family: str, method: str, threads: int = 1, **settings: object) -> Artifact:
        nonlocal count
        count += 1
        wide = {**WIDE, "dtype": torch.bfloat16 if "bfloat16" in family else torch.float32}
        source = tiny("llama", **wide) if family.startswith("llama") else tiny(family)
        torch.set_num_threads(threads)
        wanted = recipe(method, text, samples=12, **settings)
        artifact = pipeline.run(wanted, model=source, output=tmp_path / str(count) / "out").artifact
        assert torch.get_num_threads() == threads, "a run leaves torch as it was"
        return artifact

    return made


@pytest.mark.parametrize(("family", "method"), CASES)
def test_threads_and_repetition_change_no_byte(family: str, method: str, make: Callable[..., Artifact]) -> None:
    first = make(family, method)
    for threads in (1, 2, 3):
        again = make(family, method, threads)
        assert harness.tensor_hashes(again) == harness.tensor_hashes(first)
        assert again.artifact_id == first.artifact_id
        assert harness.snapshot(again.path) == harness.snapshot(first.path), "every file, with the clock held"


@pytest.mark.parametrize("method", METHODS)
def test_another_seed_draws_other_tokens(method: str, make: Callable[..., Artifact]) -> None:
    first, second = make("llama", method, seed=0), make("llama", method, seed=1)
    assert first.manifest.recipe_hash != second.manifest.recipe_hash
    differing = {
        name for name, sha256 in harness.tensor_hashes(first).items() if harness.tensor_hashes(second)[name] != sha256
    }
    if method == "rtn":
        assert not differing, "rounding has nothing to draw"
        return
    assert first.manifest.calibration is not None
    assert second.manifest.calibration is not None
    assert first.manifest.calibration.sha256 != second.manifest.calibration.sha256
    assert (first.manifest.calibration.seed, second.manifest.calibration.seed) == (0, 1)
    codes = {name for name in harness.tensor_hashes(first) if name.endswith(".weight_packed")}
    assert codes <= differing
    assert first.artifact_id != second.artifact_id


def test_more_tokens_change_the_result(make: Callable[..., Artifact]) -> None:
    short, long = make("llama", "gptq", seq_len=16), make("llama", "gptq", seq_len=24)
    assert harness.tensor_hashes(short) != harness.tensor_hashes(long)


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_in_an_artifact_makes_it_again(
    method: str, make: Callable[..., Artifact], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    first = make("gpt2", method, symmetric=False, ignore=["*.mlp.c_fc"])
    wanted = load_recipe(first.path / "recipe.yaml")
    again = pipeline.run(wanted, model=tiny("gpt2"), output=tmp_path / "again").artifact
    assert again.artifact_id == first.artifact_id
    assert harness.snapshot(again.path) == harness.snapshot(first.path)
