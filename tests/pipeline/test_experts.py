"""Experts: those that no calibration token reaches fall back by name, and chunks may reach different ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress import pipeline
from compress.calibration.tokens import draw
from compress.errors import WorkError
from compress.pipeline import inputs
from tests.pipeline import harness
from tests.pipeline.harness import CALIBRATED, recipe
from tests.tiny_models import EXPERTS, POSITIONS, VOCABULARY, tiny_tokens

FEW = {"samples": 1, "seq_len": 3}
PARTS = {"mixtral": ("w1", "w2", "w3"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3")


def unreached(source: Path, text: Path, block: int, path: str) -> set[int]:
    """The experts of a block that transformers' own model sends no calibration token to."""
    tokens = draw(
        str(text), AutoTokenizer.from_pretrained(source), **FEW, seed=0, longest=POSITIONS, vocabulary=VOCABULARY
    ).tokens
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    experts = model.get_submodule(path)
    experts.register_forward_pre_hook(
        lambda _, args, kwargs: chosen.append([*args, *kwargs.values()][1]), with_kwargs=True
    )
    harness.logits(model, tokens)
    reached = {int(number) for number in chosen[0].flatten()}
    assert 0 < len(reached) < EXPERTS
    return set(range(EXPERTS)) - reached


@pytest.mark.parametrize("method", CALIBRATED)
def test_experts_without_tokens_fall_back_and_are_named(
    method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("mixtral")
    # Attention keeps its weights, so the tokens are routed exactly as in the original model.
    wanted = recipe(method, text, **FEW, ignore=["*.self_attn.*"])
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    missing = unreached(source, text, 0, "model.layers.0.mlp.experts")
    expected = {
        f"model.layers.0.block_sparse_moe.experts.{number}.{part}" for number in missing for part in PARTS["mixtral"]
    }
    fallbacks = {fallback.name: fallback for fallback in artifact.manifest.fallbacks}
    assert {name for name in fallbacks if ".layers.0." in name} == expected
    assert {(f.action, f.reason) for f in fallbacks.values()} == {("rtn", "no calibration token reached it")}
    for layer in artifact.layers():
        if layer["scheme"] is not None:
            assert layer["fallback"] == ("rtn" if layer["name"] in fallbacks else None)
            assert (layer["output_error"] is None) == (layer["name"] in fallbacks)
    tokens = tiny_tokens(2, 12)
    fake = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), fake, rtol=1e-5, atol=1e-5)
    matrices, before, after = 0, harness.tensors(source), harness.decoded(artifact)
    for name in expected:
        weight = before[f"{name}.weight"]
        matrices += 1
        folded = method == "awq" and not name.endswith("w2")  # its columns were scaled along with its neighbours'
        if not folded:
            assert harness.distance(after[f"{name}.weight"], weight) < 0.1
    assert matrices == 3 * len(missing)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("method", CALIBRATED)
def test_chunks_that_reach_different_experts(
    method: str, family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokens = tiny(family), tiny_tokens(2, 12)
    wanted = recipe(method, text, samples=8, seq_len=4)
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    monkeypatch.setattr(inputs, "CHUNK_TOKENS", 4)
    parts = pipeline.run(wanted, model=source, output=tmp_path / "parts").artifact
    first = [f for f in whole.manifest.fallbacks if ".layers.0." in f.name]
    assert [f for f in parts.manifest.fallbacks if ".layers.0." in f.name] == first
    assert whole.manifest.ledger.keys() == parts.manifest.ledger.keys()
    for artifact in (whole, parts):
        found = {name for name, entry in artifact.manifest.ledger.items() if entry.action == "quantized"}
        assert found == harness.block_matrices(harness.tensors(source))
        expected = harness.fake_quantized_logits(source, artifact, tokens)
        torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-5, atol=1e-5)
    # The same statistics, summed in another order: single codes may differ, errors hardly.
    one, other = (
        [layer["output_error"] or 0.0 for layer in artifact.layers() if layer["block"] == 0]
        for artifact in (whole, parts)
    )
    assert sum(one) == pytest.approx(sum(other), rel=0.1)


@pytest.mark.parametrize("method", harness.METHODS)
def test_an_expert_with_nan_is_refused_though_no_token_reaches_it(
    method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    number = min(unreached(tiny("mixtral"), text, 0, "model.layers.0.mlp.experts"))
    name = f"model.layers.0.block_sparse_moe.experts.{number}.w2.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][1, 2] = torch.nan
        return tensors

    source = harness.copy_with(tiny("mixtral"), tmp_path / "spoilt", spoil)
    with pytest.raises(WorkError, match=name):
        pipeline.run(recipe(method, text, **FEW), model=source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
