"""Quantised embeddings and heads: what the artifact holds is what is computed, tied or not, by every reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact.verify import verify
from compress.exporters.dense import export_dense
from compress.formats.compressed_tensors import is_for_own_reader
from compress.recipe import Recipe, parse_recipe
from compress.runtime import loading
from compress.types import IntScheme
from tests.pipeline import harness
from tests.tiny_models import tiny_tokens

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def asking(method: str, text: Path, **stage: Any) -> Recipe:
    """4 bits in groups of 32, and what is asked of the tables."""
    learns = {} if method in ("rtn", "hqq") else {"calibration": {"source": str(text), "samples": 8, "seq_len": 24}}
    return parse_recipe({"stages": [{"method": method, "scheme": {"bits": 4, "group_size": 32}, **learns, **stage}]})


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("asked", ["w6a16-g32", "w8a16-channel", "w3a16-g96-asym"])
def test_a_tied_table_is_stored_once_and_read_for_both_uses(
    method: str, asked: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    if method == "awq" and asked != "w6a16-g32":
        pytest.skip("one scheme shows it")
    source, tokens, wanted = tiny("llama"), tiny_tokens(2, 12), asking(method, text, embeddings=asked)
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out")
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    assert not verify(artifact.path).problems
    assert planned.bits_per_weight == pytest.approx(artifact.manifest.sizes.bits_per_weight, abs=1e-6)
    assert planned.output_bytes == pytest.approx(artifact.manifest.sizes.bytes, rel=0.06)  # headers and shapes
    names = set(artifact.manifest.tensors)
    assert {f"{EMBEDDING}.weight_packed", f"{EMBEDDING}.weight_scale", f"{EMBEDDING}.weight_shape"} <= names
    assert f"{EMBEDDING}.weight" not in names
    assert not any(name.startswith(HEAD) for name in names)
    (row,) = [layer for layer in artifact.layers() if layer["name"] == EMBEDDING]
    assert row["block"] is None
    assert row["scheme"] == asked
    assert row["method"] == ("rtn" if method == "rtn" else "gptq")
    if method != "rtn":
        assert 0 < row["output_error"] < 0.2
        assert 0 < row["details"]["lookup_error"] < 0.2
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    assert harness.distance(expected, harness.source_logits(source, tokens)) > 1e-3
    for kernel in ("auto", "reference"):
        found = loading.load(artifact.path, device="cpu", kernel=kernel)
        assert found.name == ("native" if kernel == "auto" else "transformers")
        torch.testing.assert_close(found.score(tokens), expected, rtol=1e-4, atol=1e-4)
    assert is_for_own_reader(artifact.config["quantization_config"])
    exported = export_dense(artifact.path, tmp_path / "dense").path
    torch.testing.assert_close(harness.loaded_logits(exported, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_tied_model_takes_the_head_for_the_same_table(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = tiny("llama")
    one, other = (
        pipeline.run(asking("gptq", text, **{name: "w5a16-g32"}), model=source, output=tmp_path / name).artifact
        for name in ("embeddings", "head")
    )
    assert harness.tensor_hashes(one) == harness.tensor_hashes(other)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_embedding_and_a_head_of_their_own(
    method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, tokens = tiny("llama", tie_word_embeddings=False), tiny_tokens(2, 12)
    wanted = asking(method, text, embeddings="w8a16-channel", head="w4a16-g32")
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out")
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    assert {linear.name: linear.scheme for linear in planned.linears if linear.block < 0} == {
        EMBEDDING: IntScheme(8, None),
        HEAD: IntScheme(4, 32),
    }
    assert planned.bits_per_weight == pytest.approx(artifact.manifest.sizes.bits_per_weight, abs=1e-6)
    rows = {layer["name"]: layer for layer in artifact.layers()}
    assert (rows[EMBEDDING]["method"], rows[HEAD]["method"]) == ("rtn", method)
    if method == "gptq":
        assert rows[HEAD]["details"]["corrected"]
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    for kernel in ("auto", "reference"):
        found = loading.load(artifact.path, device="cpu", kernel=kernel)
        torch.testing.assert_close(found.score(tokens), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-4, atol=1e-4)
