"""Zeros of a pruned model through quantisation: every one stays exactly zero, and the report says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact.verify import verify
from compress.calibration.statistics import LinearStats
from compress.errors import UserError, WorkError
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import Skeleton
from compress.pipeline.zeros import held, sparsity_masks
from compress.quantization import gptq
from compress.quantization.configs import GptqConfig
from compress.recipe import Recipe, parse_recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from compress.types import Fp8Scheme, InputScheme, IntScheme, QuantizedTensor
from tests.pipeline import harness

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "awq": {},
    "gptq": {},
    "gptq, plain": {"descent_sweeps": 0, "correction": 0.0, "scale_search": False},
    "smoothquant": {"rounding": {"kind": "gptq"}},
}


def recipe(method: str, text: Path, scheme: dict[str, Any], **settings: Any) -> Recipe:
    """A quantisation of a tiny model, calibrated where the method reads text."""
    stage: dict[str, Any] = {"kind": "quantize", "method": {"kind": method.split(",")[0], **settings}, "scheme": scheme}
    if method != "rtn":
        stage["calibration"] = {"source": str(text), "samples": 8, "seq_len": 24}
    return parse_recipe({"stages": [stage]})


@pytest.fixture
def pruned(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model pruned to 2:4, its zeros part of an artifact."""
    wanted = build_prune_recipe(PruneSettings(method="magnitude", pattern="2:4"))[0]
    return pipeline.run(wanted, model=tiny("llama"), output=tmp_path / "pruned").artifact.path


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("method", METHODS)
def test_every_zero_stays_through_every_method(
    method: str, symmetric: bool, pruned: Path, text: Path, tmp_path: Path
) -> None:
    if method == "smoothquant" and not symmetric:
        pytest.skip("its schemes are symmetric")
    scheme: dict[str, Any] = {"bits": 3, "group_size": 32, "symmetric": symmetric}
    if method == "smoothquant":
        scheme = {"name": "W8A8"}
    wanted = recipe(method, text, scheme, **METHODS[method])
    artifact = pipeline.run(wanted, model=pruned, output=tmp_path / "out").artifact
    before, after = harness.tensors(pruned), harness.decoded(artifact)
    for layer in artifact.layers():
        zeros = before[f"{layer['name']}.weight"] == 0
        found = after[f"{layer['name']}.weight"]
        assert not found[zeros].any(), layer["name"]
        assert found.any()
        assert layer["details"]["zeros"] == int(zeros.sum()) == zeros.numel() // 2
        assert "zeros_restored" not in layer["details"], "no method needs its zeros put back"
    card = (artifact.path / "README.md").read_text()
    assert "checked to be exactly zero after quantisation" in card
    assert verify(artifact.path).ok


def test_few_zeros_stay_where_they_are_on_record(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    wanted = build_prune_recipe(PruneSettings(method="magnitude", sparsity=0.02))[0]
    pruned = pipeline.run(wanted, model=tiny("llama"), output=tmp_path / "pruned").artifact.path
    before = harness.tensors(pruned)
    rounded = recipe("gptq", text, {"bits": 8, "group_size": 32, "symmetric": False})
    for place, count in ((pruned, lambda zeros: int(zeros.sum())), (unrecorded(pruned, tmp_path), None)):
        artifact = pipeline.run(rounded, model=place, output=tmp_path / f"{place.name}-out").artifact
        after = harness.decoded(artifact)
        for layer in artifact.layers():
            zeros = before[f"{layer['name']}.weight"] == 0
            assert 0 < int(zeros.sum()) < 0.05 * zeros.numel()
            kept = not after[f"{layer['name']}.weight"][zeros].any()
            assert (layer["details"].get("zeros"), kept) == ((None, False) if count is None else (count(zeros), True))


def unrecorded(artifact: Path, tmp_path: Path) -> Path:
    """The same model as someone else's, who recorded nothing."""
    place = tmp_path / "unrecorded"
    shutil.copytree(artifact, place, ignore=shutil.ignore_patterns("compress_*", "layers.json", "recipe.yaml"))
    return place


def test_gptq_makes_up_for_the_zeros_that_it_keeps() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 64, generator=generator), torch.randn(16, 64, generator=generator)
    x[:, 1:] += x[:, :-1]  # inputs that know of each other
    hessian, zeros = x.T @ x / 400, torch.rand(16, 64, generator=generator) < 0.5
    with ThreadPoolExecutor(1) as pool:
        shared = gptq.Preconditioner(LinearStats(hessian, None, 400), GptqConfig(), pool)
    scheme = IntScheme(4, 32)
    found = gptq.transform(weight, shared, scheme, GptqConfig(), torch.float32, zeros)
    plain = gptq.transform(weight, shared, scheme, GptqConfig(descent_sweeps=0), torch.float32, zeros)
    rounded = weight.masked_fill(zeros, 0.0)
    losses = [
        float(((weight - q) @ hessian * (weight - q)).sum()) for q in (found.dequantize(), plain.dequantize(), rounded)
    ]
    assert not found.dequantize()[zeros].any()
    assert not plain.dequantize()[zeros].any()
    assert losses[0] < losses[1] < 0.8 * losses[2], "what stays makes up for the zeros, rounded though it is"


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_zeros_and_codes_in_one_pass(
    amount: dict[str, Any], symmetric: bool, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("mistral")
    scheme = {"bits": 4, "group_size": 32, "symmetric": symmetric}
    joint = pipeline.run(recipe("gptq", text, scheme, **amount), model=source, output=tmp_path / "joint").artifact
    decoded = harness.decoded(joint)
    for layer in joint.layers():
        weight = decoded[f"{layer['name']}.weight"]
        assert layer["details"]["zeros"] == weight.numel() // 2 <= int((weight == 0).sum())
        if "pattern" in amount:
            assert bool(((weight.reshape(-1, 4) == 0).sum(1) >= 2).all())
    assert verify(joint.path).ok


def test_experts_without_tokens_lose_as_many(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    stage = recipe("gptq", text, {"bits": 4, "group_size": 32}, sparsity=0.5).model_dump(mode="json")["stages"][0]
    stage["calibration"] |= {"samples": 1, "seq_len": 2, "starved_share": 0.0}
    artifact = pipeline.run(parse_recipe({"stages": [stage]}), model=tiny("mixtral"), output=tmp_path / "out").artifact
    unseen = [layer for layer in artifact.layers() if layer["fallback"] == "rtn"]
    assert unseen
    assert all(layer["details"]["sparsity"] == 0.5 for layer in artifact.layers())


def test_the_masks_of_an_artifact_are_its_zeros(pruned: Path, tiny: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(pruned)
    specs = Skeleton(checkpoint, torch.float32).linears()
    masks = dict(sparsity_masks(checkpoint, specs))
    assert set(masks) == {spec.weight for spec in specs}
    for name, mask in masks.items():
        assert torch.equal(mask, checkpoint.read(name) == 0)
    dense = Checkpoint.open(tiny("llama"))
    assert not dict(sparsity_masks(dense, Skeleton(dense, torch.float32).linears()))


def test_codes_that_strayed_are_put_back_or_refused() -> None:
    zeros = torch.tensor([[True, False, True, False]])
    codes = torch.tensor([[3, 2, -1, -3]], dtype=torch.int8)
    zero_point = torch.tensor([[-1, 1]], dtype=torch.int8)
    for point in (None, zero_point):
        quantized = QuantizedTensor(codes, torch.full((1, 2), 0.5), point, IntScheme(4, 2, point is None))
        fixed, moved = held("some.linear", quantized, zeros)
        assert moved == 2
        assert not fixed.dequantize()[zeros].any()
        assert torch.equal(fixed.codes[~zeros], codes[~zeros])
        assert held("some.linear", fixed, zeros) == (fixed, 0)
    scheme = Fp8Scheme("channel", InputScheme("float", "token"))
    strayed = QuantizedTensor(torch.ones(1, 4).to(torch.float8_e4m3fn), torch.ones(1, 1), None, scheme)
    fixed, moved = held("some.linear", strayed, zeros)
    assert (moved, fixed.dequantize().tolist()) == (2, [[0.0, 1.0, 0.0, 1.0]])
    without = _NoZero(strayed.codes, strayed.scale, None, scheme)
    with pytest.raises(WorkError, match="no code for the 2 zeros of some"):
        held("some.linear", without, zeros)


class _NoZero(QuantizedTensor):
    """A layout in which no code means zero."""

    def dequantize(self) -> torch.Tensor:
        return self.codes.float() + 0.5


def test_two_amounts_and_patterns_that_do_not_fit_are_refused(tiny: Callable[..., Path], text: Path) -> None:
    with pytest.raises(UserError, match="not both"):
        recipe("gptq", text, {"bits": 4, "group_size": 32}, sparsity=0.5, pattern="2:4")
    plan = pipeline.plan(recipe("gptq", text, {"bits": 4, "group_size": 32}, pattern="3:7"), model=tiny("llama"))
    assert "3:7 does not divide the width 96" in plan.problems[0]
