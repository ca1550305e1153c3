"""The settings of each method reach the weights, and what they cannot have is a fallback with a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import pipeline
from compress.artifact.reader import Artifact
from compress.pipeline import fold
from compress.runtime.transformers_backend import load
from tests.pipeline import harness
from tests.pipeline.harness import METHODS, recipe, with_options
from tests.tiny_models import tiny_tokens

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"scale_search": True}),
    ("gptq", {"correction": 0.0}),
    ("gptq", {"act_order": False}),
    ("gptq", {"scale_search": False}),
    ("gptq", {"descent_sweeps": 0}),
    ("gptq", {"refit_rounds": 0}),
    ("gptq", {"damp_frac": 0.2}),
    ("awq", {"clip": False}),
    ("awq", {"duo_scaling": False}),
    ("awq", {"scale_search": False}),
    ("awq", {"grid": 3}),
]


@pytest.fixture
def make(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> Callable[..., Artifact]:
    """make(method, source=..., **options): an artifact of the tiny Qwen 2, which has biases and windows."""
    count = 0

    def made(method: str, source: Path | None = None, samples: int = 8, **options: Any) -> Artifact:
        nonlocal count
        count += 1
        wanted = with_options(recipe(method, text, samples=samples), **options)
        return pipeline.run(wanted, model=source or tiny("qwen2"), output=tmp_path / str(count)).artifact

    return made


def check_loads(artifact: Artifact, source: Path) -> None:
    """The artifact is what its values say, in transformers and in our own reader."""
    tokens = tiny_tokens(2, 12)
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=lambda value: str(value))
def test_every_option_changes_the_weights(
    method: str, options: dict[str, Any], make: Callable[..., Artifact], tiny: Callable[..., Path]
) -> None:
    usual, changed = make(method), make(method, **options)
    assert usual.manifest.recipe_hash != changed.manifest.recipe_hash
    assert harness.tensor_hashes(usual) != harness.tensor_hashes(changed)
    check_loads(changed, tiny("qwen2"))
    assert changed.manifest.fallbacks == []
    folded = any(entry.action == "folded" for entry in changed.manifest.ledger.values())
    assert folded == (method == "awq" and options != {"scale_search": False})


def ignored(artifact: Artifact) -> set[str]:
    """The linears that the config names as not quantised."""
    return set(artifact.config["quantization_config"]["ignore"])


def errors(artifact: Artifact) -> float:
    """Sum of the relative output errors of the first block's linears, whose inputs are equal for equal q, k and v."""
    return sum(layer["output_error"] for layer in artifact.layers() if layer["name"].endswith(("q_proj", "k_proj")))


def test_what_improves_gptq_does(make: Callable[..., Artifact]) -> None:
    plain = {"scale_search": False, "descent_sweeps": 0}
    assert errors(make("gptq")) < errors(make("gptq", descent_sweeps=0)) < errors(make("gptq", **plain))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_fold_that_moves_the_float_block_is_undone(
    family: str, make: Callable[..., Artifact], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny(family)
    usual = make("awq", source)
    monkeypatch.setattr(fold, "FOLD_TOLERANCE", -1.0)
    artifact = make("awq", source)
    actions = {entry.action for entry in artifact.manifest.ledger.values()}
    assert "folded" not in actions
    assert {f.action for f in artifact.manifest.fallbacks} == {"identity scale"}
    assert all("moved the float block's output" in f.reason for f in artifact.manifest.fallbacks)
    scaled = {layer["name"] for layer in usual.layers() if layer["details"].get("identity") is False}
    assert {f.name for f in artifact.manifest.fallbacks if ".0." in f.name} == {n for n in scaled if ".0." in n}
    assert all(layer["details"].get("identity", True) for layer in artifact.layers())
    # What is left is the clip search on weights that nothing has touched.
    monkeypatch.undo()
    without = make("awq", source, scale_search=False)
    assert harness.tensor_hashes(without) == harness.tensor_hashes(artifact)


def test_a_fold_is_checked_against_the_float_block(make: Callable[..., Artifact]) -> None:
    changes = [layer["details"]["fold_change"] for layer in make("awq").layers() if layer["details"].get("edge")]
    assert len(changes) > 4
    assert all(change <= fold.FOLD_TOLERANCE for change in changes)
    assert any(change > 0 for change in changes)


def test_raised_damping_is_a_fallback_with_a_name(make: Callable[..., Artifact], tiny: Callable[..., Path]) -> None:
    """Forty-eight tokens span no more than 48 of 96 directions, so without damping there is no inverse."""
    artifact = make("gptq", samples=2, damp_frac=0.0)
    raised = {f.name: f for f in artifact.manifest.fallbacks}
    assert raised
    assert {f.action for f in raised.values()} == {"damping raised"}
    assert all(f.reason.startswith("the Hessian needed damping 0.") for f in raised.values())
    for layer in artifact.layers():
        assert (layer["fallback"] == "damping raised") == (layer["name"] in raised)
        assert (layer["details"]["damp_frac"] > 0) == (layer["name"] in raised)
        assert layer["details"]["tokens"] == 48
    check_loads(artifact, tiny("qwen2"))


@pytest.mark.parametrize("method", METHODS)
def test_tensors_that_no_module_uses_are_kept(
    method: str, tiny: Callable[..., Path], make: Callable[..., Artifact], tmp_path: Path
) -> None:
    """A multi-token-prediction layer behind the last block, and a rotary buffer of an old checkpoint."""
    extra = {
        "model.layers.61.eh_proj.weight": torch.randn(96, 192),
        "model.layers.61.mlp.experts.0.up_proj.weight": torch.randn(32, 96),
        "model.layers.61.embed_tokens.weight": torch.randn(259, 96),
        "model.layers.61.enorm.weight": torch.randn(96),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(8),
    }

    def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, **extra}

    source = harness.copy_with(tiny("deepseek_v3"), tmp_path / "extra", add)
    artifact = make(method, source)
    stored = harness.tensors(artifact.path)
    for name, tensor in extra.items():
        entry = artifact.manifest.ledger[name]
        assert (entry.action, entry.into) == ("kept", [name])
        assert torch.equal(stored[name], tensor)
    assert {name.removesuffix(".weight") for name in extra if name.endswith("proj.weight")} <= ignored(artifact)
    assert not any("embed_tokens" in name or "norm" in name for name in ignored(artifact))
    alone = make(method, tiny("deepseek_v3"))
    assert harness.tensor_hashes(alone).items() < harness.tensor_hashes(artifact).items()
    check_loads(artifact, source)


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_half_precision_weights(
    method: str, tiny: Callable[..., Path], make: Callable[..., Artifact], tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def enlarge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name][:, ::7] = torch.where(tensors[name][:, ::7] > 0, 60000.0, -60000.0)
        tensors[name][3] = 0
        return tensors

    artifact = make(method, harness.copy_with(tiny("qwen2", dtype=torch.float16), tmp_path / "large", enlarge))
    assert all(torch.isfinite(t).all() for t in harness.decoded(artifact).values())
    (layer,) = [layer for layer in artifact.layers() if f"{layer['name']}.weight" == name]
    assert layer["weight_sqnr_db"] > 5


def test_an_ample_calibration_text_needs_no_fallback(packaged_model: Path, tmp_path: Path) -> None:
    """Inputs collected in bfloat16 must not cost the Hessian its definiteness."""
    wanted = recipe("gptq", "tales", group_size=128, samples=12, seq_len=256)
    artifact = pipeline.run(wanted, model=packaged_model, output=tmp_path / "out").artifact
    assert artifact.manifest.fallbacks == []
