"""Pruned artifacts with packed zeros: really smaller, loaded by us alone, dense again by export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress import pipeline
from compress.artifact.verify import verify
from compress.errors import UserError
from compress.exporters.dense import export_dense
from compress.recipe_distill import DistillSettings, build_distill_recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from compress.runtime.loading import load
from tests.pipeline import harness
from tests.tiny_models import tiny_tokens


def pruned(source: Path, output: Path, **settings: Any) -> Any:
    """An artifact with half of its weights zero, by magnitude."""
    wanted = build_prune_recipe(PruneSettings(method="magnitude", **{"sparsity": 0.5, **settings}))[0]
    return pipeline.run(wanted, model=source, output=output).artifact


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_packed_artifact_is_the_dense_one_in_less_room(
    family: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source, tokens = tiny(family, dtype=torch.bfloat16), tiny_tokens(1, 16)
    dense = pruned(source, tmp_path / "dense")
    packed = pruned(source, tmp_path / "packed", format="sparse-bitmask")
    matrices = harness.block_matrices(harness.tensors(source))
    saved = sum(harness.tensors(source)[name].nbytes for name in matrices) * 7 / 16
    assert packed.manifest.sizes.bytes < dense.manifest.sizes.bytes - 0.95 * saved
    assert packed.manifest.sizes.parameters == dense.manifest.sizes.parameters
    assert verify(packed.path).ok
    wanted = build_prune_recipe(PruneSettings(method="magnitude", sparsity=0.5, format="sparse-bitmask"))[0]
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "planned").output_bytes
    assert planned == pytest.approx(sum(t.nbytes for t in harness.tensors(packed.path).values()), rel=1e-3)
    logits = [load(artifact.path, dtype="float32", kernel="reference").score(tokens) for artifact in (dense, packed)]
    assert torch.equal(*logits)
    with pytest.raises(Exception, match="quant"):
        AutoModelForCausalLM.from_pretrained(packed.path)
    plain = export_dense(packed.path, tmp_path / "plain").path
    before, after = harness.tensors(dense.path), harness.tensors(plain)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    card = (packed.path / "README.md").read_text()
    assert "one bit for each weight" in card
    assert "export PATH --to dense" in card


def test_what_would_not_be_smaller_stays_dense(tiny: Callable[..., Path], tmp_path: Path) -> None:
    artifact = pruned(tiny("llama", dtype=torch.bfloat16), tmp_path / "out", sparsity=0.05, format="sparse-bitmask")
    assert not [name for name in harness.tensors(artifact.path) if "bitmask" in name]
    assert load(artifact.path, kernel="reference").score(tiny_tokens(1, 8)).isfinite().all()


def test_packed_zeros_are_no_source_and_cuts_have_none(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed = pruned(tiny("llama"), tmp_path / "packed", format="sparse-bitmask")
    with pytest.raises(UserError, match="stores its zeros packed") as refused:
        pipeline.plan(harness.recipe("rtn"), model=packed.path)
    assert "--to dense" in refused.value.hint
    learning = build_distill_recipe(DistillSettings(teacher=str(tiny("llama")), steps=2))
    with pytest.raises(UserError, match="stores its zeros packed") as refused:
        pipeline.plan(learning, model=packed.path)
    assert "--to dense" in refused.value.hint
    learning = build_distill_recipe(DistillSettings(teacher=str(packed.path), steps=2))
    with pytest.raises(
        UserError, match="is stored for our own reader alone, and transformers runs teachers"
    ) as refused:
        pipeline.run(learning, model=tiny("llama"), output=tmp_path / "out")
    assert "--to dense" in refused.value.hint
    with pytest.raises(UserError, match="no zeros that sparse-bitmask could pack"):
        build_prune_recipe(PruneSettings(method="width", keep=0.75, format="sparse-bitmask"))
