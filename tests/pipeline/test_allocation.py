"""Runs that share a sparsity out among blocks: exact overall, reported, resumed, and refused where it means nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.errors import UserError
from compress.recipe import Recipe, load_recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from tests.pipeline import harness


def recipe(method: str, text: Path, allocation: str, **settings: Any) -> Recipe:
    """A pruning of a tiny model; text for what reads some."""
    reads = method != "magnitude" or allocation == "owl"
    calibration = {"calib": str(text), "samples": 8, "seq_len": 24} if reads else {}
    given = {"sparsity": 0.5, "method": method, "allocation": allocation, **calibration, **settings}
    return build_prune_recipe(PruneSettings(**given))[0]


@pytest.mark.parametrize(
    ("method", "allocation"), [("magnitude", "owl"), ("magnitude", "alphapruning"), ("wanda", "owl")]
)
def test_blocks_differ_and_all_together_are_as_sparse_as_asked(
    method: str, allocation: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    def loud(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Block 1 has weights that stand out."""
        for name, tensor in tensors.items():
            if ".1." in name and tensor.ndim == 2:
                tensor[:, 0] *= 30
        return tensors

    source = harness.copy_with(tiny("llama", num_hidden_layers=3), tmp_path / "loud", loud)
    artifact = pipeline.run(recipe(method, text, allocation), model=source, output=tmp_path / "out").artifact
    stored = harness.tensors(artifact.path)
    zeros = dict.fromkeys(range(3), 0)
    sizes = dict(zeros)
    for layer in artifact.layers():
        weight = stored[f"{layer['name']}.weight"]
        assert layer["details"]["zeros"] == int((weight == 0).sum())
        assert layer["scheme"] == f"sparse50-{allocation}"
        zeros[layer["block"]] += layer["details"]["zeros"]
        sizes[layer["block"]] += weight.numel()
    shares = {block: zeros[block] / sizes[block] for block in zeros}
    assert sum(zeros.values()) / sum(sizes.values()) == pytest.approx(0.5, abs=2e-3)
    assert min(shares, key=lambda block: shares[block]) == 1, "outliers, and the heavy tail that they make, keep more"
    assert max(shares.values()) - min(shares.values()) > 0.05
    assert load_recipe(artifact.path / "recipe.yaml").hash() == artifact.manifest.recipe_hash


def test_patterns_and_cuts_are_uniform(text: Path) -> None:
    with pytest.raises(UserError, match="a pattern or a cut is uniform"):
        recipe("wanda", text, "owl", sparsity=None, pattern="2:4")
    with pytest.raises(UserError, match="allocation"):
        recipe("wanda", text, "clever")
