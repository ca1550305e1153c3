"""What folding may touch, and that the check of a fold sees the numbers that are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress import pipeline
from compress.pipeline import fold
from tests.pipeline import harness
from tests.pipeline.harness import recipe, with_options

MIXTURES = {"mixtral": "block_sparse_moe.gate", "qwen3_moe": "mlp.gate", "deepseek_v3": "mlp.gate"}


def with_salient_channels(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gains that make one channel of every norm large, as in large language models."""
    for name, tensor in tensors.items():
        if "layernorm" in name and tensor.ndim == 1:
            tensor[17] *= 40
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_the_stored_router_takes_up_exactly_what_the_norm_gives(
    family: str, dtype: torch.dtype, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = harness.copy_with(tiny(family, dtype=dtype), tmp_path / "salient", with_salient_channels)
    wanted = with_options(recipe("awq", text), clip=False)  # clipping serves one salient channel about as well
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    before, after = harness.tensors(source), harness.tensors(artifact.path)
    moved = 0
    for router in (name for name in before if name.endswith(f"{MIXTURES[family]}.weight")):
        norm = router.replace(f"{MIXTURES[family]}.weight", "post_attention_layernorm.weight")
        scale = before[norm].double() / after[norm].double()
        assert torch.equal(before[router].double() * scale, after[router].double()), "the same routing, to the bit"
        moved += int((scale != 1).sum())
    assert moved > 0, "no scale was found, so this tests nothing"
    changes = [layer["details"]["fold_change"] for layer in artifact.layers() if layer["details"].get("edge")]
    assert changes
    assert all(change <= fold.FOLD_TOLERANCE for change in changes if dtype == torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_fold_is_checked_with_the_floats_as_they_are_stored(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    change = fold.Probe.change

    def look(probe: fold.Probe) -> float:
        nonlocal seen
        for name, parameter in probe._module.named_parameters():
            if parameter.ndim == 1 or name.endswith("mlp.gate.weight"):
                assert torch.equal(parameter, parameter.bfloat16().float()), name
                seen += 1
        return change(probe)

    monkeypatch.setattr(fold.Probe, "change", look)
    source = tiny(family, dtype=torch.bfloat16)
    pipeline.run(recipe("awq", text), model=source, output=tmp_path / "out")
    assert seen > 10


def test_ignored_linears_are_not_folded(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = tiny("llama")
    kept = ["*.gate_proj", "*.up_proj"]
    artifact = pipeline.run(recipe("awq", text, ignore=kept), model=source, output=tmp_path / "out").artifact
    before, after, ledger = harness.tensors(source), harness.tensors(artifact.path), artifact.manifest.ledger
    touched = [name for name in before if ".gate_proj." in name or ".up_proj." in name]
    assert len(touched) == 8
    for name in touched:
        assert ledger[name].action == "kept"
        assert torch.equal(before[name], after[name])
    # The norm in front of them feeds nothing else; the one in front of attention is still scaled.
    for block in range(2):
        assert ledger[f"model.layers.{block}.post_attention_layernorm.weight"].action == "kept"
    assert any(entry.action == "folded" for entry in ledger.values())
    for layer in artifact.layers():
        if layer["name"].endswith("down_proj"):
            assert "edge" not in layer["details"]
