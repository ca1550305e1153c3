"""Runs that set weights to zero, on tiny models of every family: what is stored, reported, loaded and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact.output import staging_path
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import UserError, WorkError
from compress.pipeline import PrunePlan, prune_stage
from compress.pipeline.masked import finished
from compress.progress import NullProgress
from compress.pruning.configs import PRUNING
from compress.recipe import Recipe, load_recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from tests.pipeline import harness
from tests.tiny_models import FAMILIES, tiny_tokens

MASKING = [name for name, config in PRUNING.items() if not config.structured]
AMOUNTS: list[dict[str, Any]] = [{"sparsity": 0.5}, {"pattern": "2:4"}]


def recipe(method: str, text: Path, **settings: Any) -> Recipe:
    """A recipe for a tiny model, calibrated on 8 windows of 24 tokens."""
    calibration = {"calib": str(text), "samples": 8, "seq_len": 24} if PRUNING[method].calibrated else {}
    return build_prune_recipe(PruneSettings(method=method, **{**calibration, **settings}))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_shape_and_loads(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, tokens = tiny(family), tiny_tokens(2, 20)
    artifact = pipeline.run(recipe("sparsegpt", text, pattern="2:4"), model=source, output=tmp_path / "out").artifact
    before, after = harness.tensors(source), harness.tensors(artifact.path)
    assert before.keys() == after.keys()
    matrices = harness.block_matrices(before)
    for name, tensor in after.items():
        if name not in matrices:
            assert torch.equal(tensor, before[name]), name
            continue
        grouped = (tensor.T if family == "gpt2" else tensor).reshape(-1, 4)
        assert bool(((grouped == 0).sum(1) == 2).all()), name
        assert artifact.manifest.ledger[name].action == "pruned"
    found = harness.loaded_logits(artifact.path, tokens)
    assert torch.equal(found, harness.logits(harness.dense_model(source, after, torch.float32), tokens))
    assert harness.distance(found, harness.source_logits(source, tokens)) > 0.01
    assert verify(artifact.path).ok
    assert "quantization_config" not in artifact.config


@pytest.mark.parametrize("method", MASKING)
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_every_method_reaches_its_sparsity_and_says_so(
    method: str, amount: dict[str, Any], tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("llama", dtype=torch.bfloat16)
    artifact = pipeline.run(recipe(method, text, **amount), model=source, output=tmp_path / "out").artifact
    stored = harness.tensors(artifact.path)
    layers = artifact.layers()
    assert len(layers) == len(harness.block_matrices(stored))
    for layer in layers:
        weight = stored[f"{layer['name']}.weight"]
        assert weight.dtype == torch.bfloat16
        assert layer["details"]["zeros"] == int((weight == 0).sum()) == weight.numel() // 2
        assert (layer["scheme"], layer["method"]) == ("sparse50" if "sparsity" in amount else "2of4", method)
        assert (layer["output_error"] is None) == (method == "magnitude")
        assert layer["weight_sqnr_db"] > 0
    card = (artifact.path / "README.md").read_text()
    assert "50.0% of" in card
    assert "The weight files are dense" in card
    assert artifact.manifest.sizes.bytes == pytest.approx(artifact.manifest.parents[0].bytes, rel=0.05)
    assert load_recipe(artifact.path / "recipe.yaml").hash() == artifact.manifest.recipe_hash


class _StopsAfterOneBlock(NullProgress):
    def advance(self, note: str = "") -> None:
        raise WorkError("stopped", "run it again")


@pytest.mark.parametrize("method", MASKING)
def test_killed_runs_resume_to_the_same_bytes_and_threads_change_none(
    method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pipeline.inputs.CHUNK_TOKENS", 64)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source, wanted = tiny("llama"), recipe(method, text, samples=12)
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    out = tmp_path / "killed"
    with pytest.raises(WorkError, match="stopped"):
        pipeline.run(wanted, model=source, output=out, progress=_StopsAfterOneBlock())
    assert not out.exists()
    assert staging_path(out).exists()
    torch.set_num_threads(2)
    resumed = pipeline.run(wanted, model=source, output=out)
    assert (resumed.resumed_blocks, resumed.computed_blocks) == (1, 1)
    assert harness.tensor_hashes(resumed.artifact) == harness.tensor_hashes(whole)
    assert harness.snapshot(resumed.artifact.path) == harness.snapshot(whole.path)
    assert pipeline.run(wanted, model=source, output=out).complete_already


def test_ignored_linears_stay_and_the_report_says_why(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = tiny("llama")
    wanted = recipe("wanda", text, ignore=["*.down_proj"])
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    before, after = harness.tensors(source), harness.tensors(artifact.path)
    for layer in artifact.layers():
        name = f"{layer['name']}.weight"
        kept = layer["name"].endswith("down_proj")
        assert torch.equal(before[name], after[name]) == kept
        assert (layer["scheme"] is None) == kept
        assert artifact.manifest.ledger[name].action == ("kept" if kept else "pruned")


def test_experts_without_tokens_are_pruned_by_magnitude_and_recorded(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    wanted = recipe("sparsegpt", text, samples=1, seq_len=2)
    artifact = pipeline.run(wanted, model=tiny("mixtral"), output=tmp_path / "out").artifact
    unseen = [f for f in artifact.manifest.fallbacks if f.action == "magnitude"]
    assert unseen
    assert all("no calibration token" in fallback.reason for fallback in unseen)
    assert all(layer["details"]["sparsity"] == 0.5 for layer in artifact.layers())


def test_a_plan_counts_the_zeros_and_names_what_does_not_fit(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("llama")
    plan = pipeline.plan(recipe("sparsegpt", text), model=source, output=tmp_path / "out")
    assert isinstance(plan, PrunePlan)
    artifact = pipeline.run(recipe("sparsegpt", text), model=source, output=tmp_path / "out").artifact
    assert plan.zeros == sum(layer["details"]["zeros"] for layer in artifact.layers())
    assert plan.output_bytes == pytest.approx(artifact.manifest.sizes.bytes, rel=0.05)
    assert plan.parameters == artifact.manifest.sizes.parameters
    assert plan.peak_memory_bytes > 0 < plan.seconds_estimate
    assert not plan.problems
    misfit = recipe("wanda", text, pattern="3:7")
    assert "3:7 does not divide the width 96" in pipeline.plan(misfit, model=source).problems[0]
    with pytest.raises(UserError, match="3:7 does not divide"):
        pipeline.run(misfit, model=source, output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("method", MASKING)
@pytest.mark.parametrize("amount", [{"sparsity": 0.6}, {"sparsity": 0.2}, {"pattern": "2:4"}], ids=str)
def test_a_second_pruning_keeps_every_zero_of_the_first(
    method: str, amount: dict[str, Any], tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    first = pipeline.run(recipe("ria", text, sparsity=0.4), model=tiny("llama"), output=tmp_path / "first").artifact
    second = pipeline.run(recipe(method, text, **amount), model=first.path, output=tmp_path / "second").artifact
    before, after = harness.tensors(first.path), harness.tensors(second.path)
    for layer in second.layers():
        zeros, now = (stored[f"{layer['name']}.weight"] == 0 for stored in (before, after))
        assert bool(now[zeros].all()), layer["name"]
        assert layer["details"]["zeros_kept"] == int(zeros.sum())
        share = float(now.float().mean())
        wanted = max(0.4, amount.get("sparsity", 0.5))
        assert wanted - 1e-3 <= share <= wanted + (0.12 if "pattern" in amount or wanted == 0.4 else 0.02)


def test_a_zero_that_came_back_is_not_published(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pipeline.run(recipe("magnitude", text), model=tiny("llama"), output=tmp_path / "first").artifact

    def revived(job: Any, spec: Any, original: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
        return finished(job, spec, original, weight + 1.0, *rest)

    monkeypatch.setattr("compress.pipeline.mask_block.finished", revived)
    with pytest.raises(WorkError, match="did not stay zero"):
        pipeline.run(recipe("wanda", text), model=first.path, output=tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_pruned_artifact_can_be_quantised(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    pruned = pipeline.run(recipe("magnitude", text), model=tiny("llama"), output=tmp_path / "pruned").artifact
    quantised = pipeline.run(harness.recipe("rtn"), model=pruned.path, output=tmp_path / "both").artifact
    assert isinstance(quantised, Artifact)
    assert verify(quantised.path).ok


def test_what_is_not_the_pruned_model_is_not_published(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny("llama"), tmp_path / "out"
    wanted = build_prune_recipe(PruneSettings(method="magnitude", sparsity=0.5))[0]
    right, stored = prune_stage.PruneKind.config, prune_stage._stored
    with monkeypatch.context() as patched:
        patched.setattr(prune_stage.PruneKind, "config", lambda kind, job: {**right(kind, job), "hidden_size": 48})
        with pytest.raises(WorkError, match="would not load the pruned model"):
            pipeline.run(wanted, model=source, output=out)
    filled = lambda job, linear: {name: t + 1e-3 for name, t in stored(job, linear).items()}  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(prune_stage, "_stored", filled)
        with pytest.raises(WorkError, match="other zeros than it was given"):
            pipeline.run(wanted, model=source, output=out, restart=True)
    assert not out.exists()
