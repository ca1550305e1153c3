"""Rotated models: the same float function, its rounding in the artifact, every tensor accounted for, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import UserError, WorkError
from compress.models import residual
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import Skeleton
from compress.pipeline import rotated
from compress.quantization.configs import HadamardConfig
from compress.recipe import Recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from compress.runtime.transformers_backend import load
from tests.pipeline import harness
from tests.pipeline.harness import recipe, with_options
from tests.tiny_models import FAMILIES, tiny_tokens

BOTH = HadamardConfig.model_validate({})
HEADS = HadamardConfig.model_validate({"residual": False})


def wanted(text: Path, rounding: str = "rtn", **settings: Any) -> Recipe:
    """A recipe for a tiny model; `residual` and `heads` are the method's."""
    options = {key: settings.pop(key) for key in ("residual", "heads") if key in settings}
    return with_options(recipe("hadamard", text, **settings), rounding=rounding, **options)


def untied(source: Path, target: Path) -> Path:
    """The source with a config that ties nothing, which is what a rotated artifact is a model of."""
    harness.copy_with(source, target, lambda tensors: tensors)
    config = harness.read_json(source / "config.json")
    (target / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_the_float_model_stays_the_same_or_is_refused_by_name(family: str, tiny: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny(family))
    skeleton = Skeleton(checkpoint, torch.float32)
    for method in (BOTH, HEADS):
        problems = rotated.problems(method, skeleton)
        if family in residual.ROTATABLE or (method is HEADS and family in residual.HEADS_ONLY):
            assert problems == []
            assert rotated.check(method, checkpoint, 0, tiny_tokens(1, 20)) < 1e-4
            view = rotated.rotated(method, skeleton, 0, None)
            changed = {name for name in checkpoint.index if not torch.equal(view.read(name), checkpoint.read(name))}
            assert changed == {name for name in checkpoint.index if view.changes(name)}
            assert (skeleton.embedding in changed) == method.residual
            # With the residual stream all linears turn that touch it; with heads alone, those of values and o_proj.
            left = {spec.weight for spec in skeleton.linears()} - changed
            inside = [name for name in left if not name.endswith("q_b_proj.weight")]  # reads a latent of its own
            assert not inside if method.residual else len(skeleton.linears()) - len(left) == 2 * skeleton.num_blocks
        else:
            assert family in problems[0].message


def test_a_rotation_that_changes_the_model_is_refused(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual, "WRITERS", (".o_proj",))  # as if down_proj wrote elsewhere
    with pytest.raises(WorkError, match="moved its float logits"):
        pipeline.run(wanted(text), model=tiny("llama"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "rounding", "options"),
    [
        ("llama", "gptq", {}),
        ("phi3", "rtn", {"heads": False}),
        ("qwen3_moe", "rtn", {}),
        ("deepseek_v3", "gptq", {}),
        ("gemma3_text", "gptq", {"residual": False}),
    ],
)
def test_the_artifact_is_the_rounded_rotated_model(
    family: str, rounding: str, options: dict[str, bool], tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, tokens = tiny(family), tiny_tokens(2, 12)
    asked = wanted(text, rounding, bits=8, **options)
    planned = pipeline.plan(asked, model=source, output=tmp_path / "out")
    artifact = pipeline.run(asked, model=source, output=tmp_path / "out").artifact
    like = untied(source, tmp_path / "like") if options.get("residual", True) else source
    expected = harness.fake_quantized_logits(like, artifact, tokens)
    torch.testing.assert_close(load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-4, atol=1e-4)
    assert 0 < harness.distance(expected, harness.source_logits(source, tokens)) < 0.1, "8 bits of the same function"
    assert verify(artifact.path).problems == []
    check_ledger(artifact, source)
    stored = sum(tensor.nbytes for name, tensor in harness.tensors(artifact.path).items() if "_shape" not in name)
    assert planned.output_bytes == stored


def check_ledger(artifact: Artifact, source: Path) -> None:
    """Every source tensor is there, what is no linear of a block is kept or folded, and a tied head is written."""
    before, after, ledger = harness.tensors(source), harness.tensors(artifact.path), artifact.manifest.ledger
    assert set(ledger) == set(before)
    assert sorted(name for entry in ledger.values() for name in entry.into) == sorted(after)
    assert {name for name, entry in ledger.items() if entry.action == "quantized"} == harness.block_matrices(before)
    for name, entry in ledger.items():
        if entry.action == "kept":
            assert torch.equal(before[name], after[name])
        elif entry.action == "folded":
            assert not torch.equal(before[name], after[name])
    if ledger["model.embed_tokens.weight"].action == "folded":
        assert "lm_head.weight" in after
        assert artifact.config["tie_word_embeddings"] is False
        gains = [after[name] for name in after if name.endswith(("input_layernorm.weight", "model.norm.weight"))]
        assert gains
        assert all(gain.eq(1).all() for gain in gains)


def test_half_precision_and_ignored_linears(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, tokens = tiny("llama", dtype=torch.bfloat16), tiny_tokens(2, 12)
    asked = wanted(text, bits=8, ignore=["*.1.mlp.*"])
    artifact = pipeline.run(asked, model=source, output=tmp_path / "out").artifact
    stored = harness.tensors(artifact.path)
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert artifact.manifest.ledger["model.layers.1.mlp.up_proj.weight"].action == "folded"
    found = load(artifact.path, device="cpu").score(tokens)
    assert harness.distance(found, harness.source_logits(source, tokens)) < 0.05


def test_another_seed_is_another_rotation(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    made = [
        pipeline.run(wanted(text, seed=seed), model=tiny("llama"), output=tmp_path / str(seed)).artifact
        for seed in (0, 1)
    ]
    first, second = (harness.tensors(artifact.path)["model.embed_tokens.weight"] for artifact in made)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first @ first.T, second @ second.T, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_rotated_is_refused_with_a_way_out(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="gemma2 models cannot be rotated") as refusal:
        pipeline.run(wanted(text), model=tiny("gemma2"), output=tmp_path / "out")
    assert "residual: false" in refusal.value.hint
    odd = tiny("llama", hidden_size=102, num_attention_heads=6)
    with pytest.raises(UserError, match="no Hadamard matrix of order 102") as refusal:
        pipeline.run(wanted(text, group_size="channel"), model=odd, output=tmp_path / "out")
    assert "residual: false" in refusal.value.hint
    heads = wanted(text, group_size="channel", residual=False)
    assert pipeline.plan(heads, model=odd, output=tmp_path / "out").problems == []
    with pytest.raises(ValueError, match="rotates nothing"):
        HadamardConfig.model_validate({"residual": False, "heads": False})


@pytest.mark.parametrize("residual_too", [True, False])
def test_a_pruned_model_is_refused_since_its_zeros_would_go(
    residual_too: bool, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    zeros = build_prune_recipe(PruneSettings(method="magnitude", sparsity=0.5))[0]
    pruned = pipeline.run(zeros, model=tiny("llama"), output=tmp_path / "pruned").artifact
    with pytest.raises(UserError, match="was pruned, and a rotation would fill its zeros") as refusal:
        pipeline.run(wanted(text, residual=residual_too), model=pruned.path, output=tmp_path / "out")
    assert "gptq" in refusal.value.hint
    assert not (tmp_path / "out").exists()
