"""Experts: those that no calibration token reaches fall back by name, and chunks may reach different ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress import pipeline
from compress.artifact.coverage import coverage
from compress.calibration.tokens import draw
from compress.errors import UserError, WorkError
from compress.pipeline import duration, inputs
from compress.recipe import Recipe, parse_recipe
from compress.recipe_build import Settings, build_recipe
from compress.recipe_sections import CalibrationConfig
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


def calibrated(wanted: Recipe, **settings: object) -> Recipe:
    """The recipe with settings of its calibration changed."""
    stage = wanted.stages[0]
    assert stage.calibration is not None
    calibration = CalibrationConfig(**{**stage.calibration.model_dump(), **settings})
    return wanted.model_copy(update={"stages": [stage.model_copy(update={"calibration": calibration})]})


def sent(source: Path, text: Path, path: str, **drawn: int) -> list[int]:
    """How many calibration tokens transformers' own model sends to each expert of its first mixture."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = draw(str(text), tokenizer, **drawn, seed=0, longest=POSITIONS, vocabulary=VOCABULARY).tokens
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    model.get_submodule(path).register_forward_pre_hook(
        lambda _, args, kwargs: chosen.append([*args, *kwargs.values()][1]), with_kwargs=True
    )
    harness.logits(model, tokens)
    return torch.bincount(chosen[0].flatten(), minlength=EXPERTS).tolist()


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("experts", ["routed", "all"])
def test_what_experts_learn_from(
    experts: str, method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Starved experts learn from all tokens, and every expert's routed tokens are reported as transformers counts."""
    source, drawn, share = tiny("mixtral"), {"samples": 4, "seq_len": 12}, 0.25
    wanted = recipe(method, text, **drawn, ignore=["*.self_attn.*"])
    wanted = calibrated(wanted, experts=experts, starved_share=share)
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    routed = sent(source, text, "model.layers.0.mlp.experts", **drawn)
    starved = {number for number, count in enumerate(routed) if count < share * 48} if experts == "routed" else set()
    assert len(starved) < EXPERTS
    layers = [layer for layer in artifact.layers() if ".layers.0." in layer["name"] and "experts" in layer["name"]]
    assert len(layers) == 3 * EXPERTS
    for layer in layers:
        number = int(layer["name"].split(".experts.")[1].split(".")[0])
        assert layer["details"]["routed_tokens"] == routed[number]
        assert (layer["fallback"] == "all tokens") == (number in starved)
        assert layer["output_error"] is not None
        if method == "gptq":
            everything = experts == "all" or number in starved
            assert layer["details"]["tokens"] == (48 if everything else routed[number])
    named = {f.name: f for f in artifact.manifest.fallbacks if ".layers.0." in f.name and f.action == "all tokens"}
    assert set(named) == {layer["name"] for layer in layers if layer["fallback"] == "all tokens"}
    assert all("of 48 calibration tokens, fewer than 25%" in fallback.reason for fallback in named.values())
    block = coverage(artifact.layers())[0]
    assert (block.tokens, block.fallbacks) == (tuple(routed), len(starved))
    card = (artifact.path / "README.md").read_text()
    assert f"| 0 | {EXPERTS} | {min(routed)} |" in card
    assert (experts == "routed") == bool(starved), "the test model must starve some"
    before, after = harness.tensors(source), harness.tensors(artifact.path)
    routers = [name for name in before if name.endswith("block_sparse_moe.gate.weight")]
    assert len(routers) == 2
    if method == "gptq":
        assert all(torch.equal(before[name], after[name]) for name in routers)
    tokens = tiny_tokens(2, 12)
    fake = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), fake, rtol=1e-5, atol=1e-5)


def test_the_plan_counts_what_all_tokens_for_all_experts_cost(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rate in ("product_rate", "rounding_rate"):  # what is left to differ is the number of operations
        monkeypatch.setattr(duration, rate, lambda *_: 1.0)
    source, found = tiny("mixtral"), {}
    for experts in ("routed", "all"):
        settings = Settings(method="gptq", group_size=32, calib=str(text), samples=4, seq_len=12, experts=experts)
        planned = pipeline.plan(build_recipe(settings)[0], model=source, output=tmp_path / "out")
        assert planned.problems == []
        found[experts] = planned
    assert found["routed"].experts_per_token == (2, EXPERTS)
    assert found["all"].experts_per_token == (EXPERTS, EXPERTS)
    assert found["all"].seconds_estimate > 1.1 * found["routed"].seconds_estimate
    dense = build_recipe(Settings(method="gptq", group_size=32, calib=str(text), experts="all"))[0]
    assert "the model has no experts" in pipeline.plan(dense, model=tiny("llama"), output=tmp_path / "out").problems[0]
    with pytest.raises(UserError, match="sweep calibrates experts on routed tokens alone"):
        build_recipe(Settings(method="sweep", experts="all"))


@pytest.mark.parametrize("bad", [{"experts": "some"}, {"starved_share": 1.0}, {"starved_share": -0.1}])
def test_settings_of_experts_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        parse_recipe({"stages": [{"method": "gptq", "calibration": bad}]})


def test_methods_that_cannot_send_all_tokens_say_so() -> None:
    stage = {"kind": "prune", "method": "wanda", "sparsity": 0.5, "calibration": {"experts": "all"}}
    with pytest.raises(UserError, match="wanda calibrates experts on routed tokens alone"):
        parse_recipe({"stages": [stage]})


@pytest.mark.parametrize("method", CALIBRATED)
def test_experts_without_tokens_fall_back_and_are_named(
    method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("mixtral")
    # Attention keeps its weights, so the tokens are routed exactly as in the original model.
    wanted = calibrated(recipe(method, text, **FEW, ignore=["*.self_attn.*"]), starved_share=0.0)
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
