"""Bits, groups and symmetry: what the recipe asks for is what the artifact holds and what transformers computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from compress import pipeline
from compress.artifact.reader import Artifact
from compress.runtime.transformers_backend import load
from tests.pipeline import harness
from tests.pipeline.harness import METHODS, recipe
from tests.tiny_models import FAMILIES, tiny_tokens

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 1}
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
GRID = list(itertools.product((2, 3, 4, 8), (32, 64, 128, "channel"), (True, False)))
# Every bit width meets every group size and both symmetries; each method sees a different share of the grid.
SHARES = {"rtn": GRID, "gptq": GRID[::3], "awq": GRID[1::3]}
CASES = [
    pytest.param(method, *case, id="-".join(map(str, (method, *case)))) for method in METHODS for case in SHARES[method]
]


@pytest.mark.parametrize(("method", "bits", "group_size", "symmetric"), CASES)
def test_every_layout(
    method: str,
    bits: int,
    group_size: int | str,
    symmetric: bool,
    tiny: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    source = tiny("llama", **WIDE)
    wanted = recipe(method, text, bits=bits, group_size=group_size, symmetric=symmetric)
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    tokens = tiny_tokens(2, 12)
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-5, atol=1e-5)
    lost = harness.distance(expected, harness.source_logits(source, tokens))
    assert 0.001 < lost < {2: 2.0, 3: 1.0, 4: 0.5, 8: 0.05}[bits]
    check_layout(artifact, bits, group_size, symmetric)


def check_layout(artifact: Artifact, bits: int, group_size: int | str, symmetric: bool) -> None:
    """Shapes, config and sizes follow from the layout, worked out by hand here."""
    stored = harness.tensors(artifact.path)
    weights = codes = scales = 0
    for name in (name for name in stored if name.endswith(".weight_shape")):
        linear = name.removesuffix(".weight_shape")
        out, width = stored[name].tolist()
        groups = 1 if group_size == "channel" else width // int(group_size)
        assert stored[f"{linear}.weight_packed"].shape == (out, width * bits // 32)
        assert stored[f"{linear}.weight_scale"].shape == (out, groups)
        assert (f"{linear}.weight_zero_point" in stored) == (not symmetric)
        weights, codes, scales = weights + out * width, codes + out * width * bits, scales + out * groups
    per_weight = (codes + scales * (32 + (0 if symmetric else bits))) / weights  # scales are float32 as the source is
    assert artifact.manifest.sizes.bits_per_weight == pytest.approx(per_weight, abs=1e-6)
    assert artifact.manifest.sizes.quantized_parameters == weights
    (group,) = artifact.config["quantization_config"]["config_groups"].values()
    described = {key: group["weights"][key] for key in ("num_bits", "strategy", "group_size", "symmetric", "type")}
    assert described == {
        "num_bits": bits,
        "strategy": "channel" if group_size == "channel" else "group",
        "group_size": None if group_size == "channel" else group_size,
        "symmetric": symmetric,
        "type": "int",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_asymmetric_codes_of_every_family(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, tokens = tiny(family), tiny_tokens(2, 12)
    artifact = pipeline.run(recipe("rtn", symmetric=False), model=source, output=tmp_path / "out").artifact
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-5, atol=1e-5)
    if family in (*EXPERTS, "gpt2"):
        for options in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
            with pytest.raises(ValueError, match="quant"):
                AutoModelForCausalLM.from_pretrained(artifact.path, **options)
    else:
        torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_ignored_linears_keep_their_bytes(method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, tokens = tiny("llama"), tiny_tokens(2, 12)
    wanted = recipe(method, text, ignore=["*.0.mlp.*", "re:.*1\\.self_attn\\.o_proj$"])
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    ledger = artifact.manifest.ledger
    kept = {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    kept.add("model.layers.1.self_attn.o_proj.weight")
    matrices = harness.block_matrices(harness.tensors(source))
    assert {name for name in matrices if ledger[name].action == "quantized"} == matrices - kept
    assert all(ledger[name].action in ("kept", "folded") for name in kept)
    layers = {layer["name"]: layer for layer in artifact.layers()}
    assert {f"{name}.weight" for name in layers} == matrices
    for name in kept:
        layer = layers[name.removesuffix(".weight")]
        assert layer["scheme"] is None
        assert layer["reason"].startswith("ignored by ")
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_sources_keep_their_dtype(
    method: str, dtype: torch.dtype, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, tokens = tiny("qwen3", dtype=dtype), tiny_tokens(2, 12)
    artifact = pipeline.run(recipe(method, text), model=source, output=tmp_path / "out").artifact
    stored = harness.tensors(artifact.path)
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {dtype}
    assert artifact.manifest.sizes.bits_per_weight == pytest.approx(4.5)
    # In float32 transformers multiplies codes and scales without rounding the product to the stored dtype.
    expected = harness.fake_quantized_logits(source, artifact, tokens, dtype)
    torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens, dtype="auto"), expected)
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-5, atol=1e-5)
    assert 0.02 < harness.distance(expected, harness.source_logits(source, tokens)) < 0.6


def test_a_stored_copy_of_a_tied_tensor_is_not_written_twice(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = harness.copy_with(tiny("llama"), tmp_path / "copied", with_head)
    wanted = recipe("rtn")
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out").output_bytes
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    entry = artifact.manifest.ledger["lm_head.weight"]
    assert (entry.action, entry.into) == ("tied", ["model.embed_tokens.weight"])
    stored = harness.tensors(artifact.path)
    assert "lm_head.weight" not in stored
    assert sum(t.nbytes for name, t in stored.items() if not name.endswith("weight_shape")) == planned
    tokens = tiny_tokens(2, 12)
    alone = pipeline.run(wanted, model=tiny("llama"), output=tmp_path / "alone").artifact
    assert harness.tensor_hashes(alone) == harness.tensor_hashes(artifact)
    assert torch.equal(harness.loaded_logits(artifact.path, tokens), harness.loaded_logits(alone.path, tokens))


def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
