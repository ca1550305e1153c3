"""HQQ, AWQ then GPTQ, rotations, AutoRound: what the other methods are held to, on a smaller grid of families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact import durable
from compress.artifact.verify import verify
from compress.errors import WorkError
from compress.pipeline import inputs
from compress.recipe import Recipe
from compress.runtime.transformers_backend import load
from tests.pipeline import harness
from tests.pipeline.harness import recipe, with_options
from tests.tiny_models import tiny_tokens

METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "hqq": ("hqq", {}, {"symmetric": False}),
    "awq then gptq": ("awq", {"rounding": "gptq"}, {}),
    "awq then rtn": ("awq", {"rounding": "rtn"}, {}),
    "autoround": ("autoround", {"steps": 10, "windows": 3, "checks": 2}, {}),
    "autoround with zero points": ("autoround", {"steps": 6, "windows": 3}, {"symmetric": False}),
    "ternary": ("ternary", {}, {"bits": 2, "group_size": "channel"}),
    "hadamard": ("hadamard", {}, {}),
}
"""Name -> (kind, its options, settings of the run)."""
CASES = [("llama", name) for name in METHODS if name != "hadamard"]  # test_hadamard.py has its own
CASES += [(family, "awq then gptq") for family in ("mixtral", "opt", "gemma3_text")]
CASES += [(family, "autoround") for family in ("mixtral", "gpt2")]


def wanted(name: str, text: Path, **settings: Any) -> Recipe:
    """The recipe of one of METHODS for a tiny model."""
    kind, options, layout = METHODS[name]
    return with_options(recipe(kind, text, **layout, **settings), **options)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_artifact_is_the_fake_quantised_model(
    family: str, name: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, tokens = tiny(family), tiny_tokens(2, 12)
    artifact = pipeline.run(wanted(name, text), model=source, output=tmp_path / "out").artifact
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-5, atol=1e-5)
    if family != "gpt2" and (
        family == "llama" or METHODS[name][2].get("symmetric", True)
    ):  # GPT-2's layout is for our own reader
        torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-5, atol=1e-5)
    most = 1.5 if name == "ternary" else 0.6
    assert 0.01 < harness.distance(expected, harness.source_logits(source, tokens)) < most
    ledger, before = artifact.manifest.ledger, harness.tensors(source)
    assert {n for n, entry in ledger.items() if entry.action == "quantized"} == harness.block_matrices(before)
    assert any(entry.action == "folded" for entry in ledger.values()) == name.startswith("awq")
    assert verify(artifact.path).problems == []
    layers = artifact.layers()
    assert {layer["method"] for layer in layers} == {METHODS[name][0]}
    if name.startswith("autoround"):
        losses = [(layer["details"]["block_loss"], layer["details"]["block_loss_before"]) for layer in layers]
        assert all(after <= before for after, before in losses), "the start, rounded to nearest, counts too"
    if name == "awq then gptq":
        seen = [layer["details"] for layer in layers if not layer["fallback"]]
        assert all("damp_frac" in details for details in seen), "GPTQ rounded"
        assert any(not details.get("identity", True) for details in seen), "AWQ scaled"


@pytest.mark.parametrize("name", METHODS)
def test_it_is_resumed_on_other_threads_and_ends_in_the_same_bytes(
    name: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "CHUNK_TOKENS", 64)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source, asked = tiny("llama"), wanted(name, text, samples=12)
    whole = pipeline.run(asked, model=source, output=tmp_path / "whole").artifact
    with monkeypatch.context() as patched:
        patched.setattr(durable, "step", harness.failing_at("before write block-00001.safetensors"))
        with pytest.raises(WorkError, match="the disk is full"):
            pipeline.run(asked, model=source, output=tmp_path / "out")
    torch.set_num_threads(3)
    result = pipeline.run(asked, model=source, output=tmp_path / "out")
    assert (result.resumed_blocks, result.computed_blocks) == (1, 1)
    assert result.artifact.artifact_id == whole.artifact_id
    assert harness.snapshot(result.artifact.path) == harness.snapshot(whole.path)


def test_autoround_lowers_the_error_of_blocks_on_windows_that_teach_nothing(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    asked = with_options(recipe("autoround", text, bits=3, group_size=16, samples=64), steps=40, windows=16)
    artifact = pipeline.run(asked, model=tiny("llama"), output=tmp_path / "out").artifact
    for layer in artifact.layers():
        assert layer["details"]["block_loss"] < 0.95 * layer["details"]["block_loss_before"]


def test_awq_then_gptq_is_gptq_where_no_scale_is_searched(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("llama")
    plain = pipeline.run(recipe("gptq", text), model=source, output=tmp_path / "gptq").artifact
    through = with_options(recipe("awq", text), rounding="gptq", scale_search=False)
    artifact = pipeline.run(through, model=source, output=tmp_path / "out").artifact
    assert harness.tensor_hashes(artifact) == harness.tensor_hashes(plain)
