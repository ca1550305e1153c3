"""Scales of an FP8 key and value cache: what calibration finds, where they lie, and that all readers round by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from compress import pipeline
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import IntegrityError, UserError
from compress.exporters.dense import export_dense
from compress.pipeline.resolve import resolve
from compress.recipe import Recipe, parse_recipe
from compress.recipe_build import Settings, build_recipe
from compress.runtime.transformers_backend import load
from tests.pipeline import harness
from tests.tiny_models import tiny_tokens

CASES = [("llama", "FP8_DYNAMIC", "rtn"), ("phi3", "FP8_STATIC", "rtn"), ("qwen2", "W8A8", "gptq")]
CASES += [("qwen3", "FP8_DYNAMIC", "smoothquant")]
Make = Callable[..., Artifact]


@pytest.fixture
def wanted(text: Path) -> Callable[..., Recipe]:
    """wanted(scheme, method, kv_cache): a recipe with calibration text."""

    def built(scheme: str, method: str = "rtn", kv_cache: str | None = "fp8") -> Recipe:
        given = {"calib": str(text), "samples": 8, "seq_len": 24}
        if kv_cache is None and method == "rtn" and not scheme.endswith("_STATIC"):
            given = {}
        return build_recipe(Settings(scheme=scheme, method=method, kv_cache=kv_cache, **given))[0]

    return built


@pytest.mark.parametrize(("family", "scheme", "method"), CASES)
def test_transformers_and_our_runtime_round_the_cache_alike(
    family: str, scheme: str, method: str, tiny: Callable[..., Path], wanted: Callable[..., Recipe], tmp_path: Path
) -> None:
    source, tokens = tiny(family), tiny_tokens(2, 12)
    with_cache = pipeline.run(wanted(scheme, method), model=source, output=tmp_path / "with").artifact
    without = pipeline.run(wanted(scheme, method, None), model=source, output=tmp_path / "without").artifact
    scores, plain = (load(artifact.path, device="cpu").score(tokens) for artifact in (with_cache, without))
    torch.testing.assert_close(harness.loaded_logits(with_cache.path, tokens), scores, rtol=1e-5, atol=1e-5)
    assert 1e-5 < harness.distance(scores, plain) < 0.2, "the cache is rounded, and no more than rounded"
    stored, others = harness.tensors(with_cache.path), harness.tensors(without.path)
    assert all(torch.equal(stored[name].view(torch.uint8), t.view(torch.uint8)) for name, t in others.items())
    added = {name: stored[name] for name in stored.keys() - others.keys()}
    assert len(added) == 2 * 2
    assert all(name.endswith((".self_attn.k_scale", ".self_attn.v_scale")) for name in added)
    assert {tuple(t.shape) for t in added.values()} == {(1,)}
    assert len({float(t) for t in added.values()} - {1.0}) == 4, "calibrated, not a default"
    assert verify(with_cache.path).problems == []
    assert with_cache.manifest.sizes.bits_per_weight == without.manifest.sizes.bits_per_weight
    into = {name for entry in with_cache.manifest.ledger.values() for name in entry.into}
    assert into == set(stored)


def test_scales_cover_the_largest_keys_and_values_of_the_calibration_text(
    tiny: Callable[..., Path], wanted: Callable[..., Recipe], tmp_path: Path
) -> None:
    source = tiny("llama")
    artifact = pipeline.run(wanted("FP8_DYNAMIC"), model=source, output=tmp_path / "with").artifact
    without = pipeline.run(wanted("FP8_DYNAMIC", kv_cache=None), model=source, output=tmp_path / "without").artifact
    calibration = resolve(wanted("FP8_DYNAMIC"), model=source, output=None, device="cpu").calibration
    assert calibration is not None
    model = AutoModelForCausalLM.from_pretrained(without.path, dtype=torch.float32)
    with torch.no_grad():
        cache = model.eval()(calibration.tokens, use_cache=True).past_key_values
    stored = harness.tensors(artifact.path)
    for place, layer in enumerate(cache.layers):
        for part, states in (("k_scale", layer.keys), ("v_scale", layer.values)):
            found = float(stored[f"model.layers.{place}.self_attn.{part}"])
            assert found == pytest.approx(float(states.abs().amax()) / 448, rel=0.02)


def test_generation_goes_through_the_rounded_cache(
    tiny: Callable[..., Path], wanted: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A token at a time gives the same as all at once: what is cached was rounded on its way in, once."""
    artifact = pipeline.run(wanted("FP8_DYNAMIC"), model=tiny("llama"), output=tmp_path / "out").artifact
    model, tokens = load(artifact.path, device="cpu").model, tiny_tokens(1, 10)
    with torch.inference_mode():
        first = model(tokens[:, :9], use_cache=True)
        last = model(tokens[:, 9:], past_key_values=first.past_key_values).logits[:, 0]
        whole = model(tokens, use_cache=False).logits[:, 9]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)


def test_a_dense_export_has_no_cache_scales(
    tiny: Callable[..., Path], wanted: Callable[..., Recipe], tmp_path: Path
) -> None:
    source = tiny("llama")
    artifact = pipeline.run(wanted("FP8_DYNAMIC"), model=source, output=tmp_path / "out").artifact
    dense = export_dense(artifact.path, tmp_path / "dense").path
    assert harness.tensors(dense).keys() == harness.tensors(source).keys()


@pytest.mark.parametrize("damage", ["missing", "zero", "infinite"])
def test_a_scale_must_be_a_number_to_divide_by(
    damage: str, tiny: Callable[..., Path], wanted: Callable[..., Recipe], tmp_path: Path
) -> None:
    artifact = pipeline.run(wanted("FP8_DYNAMIC"), model=tiny("llama"), output=tmp_path / "out").artifact
    stored, name = harness.tensors(artifact.path), "model.layers.1.self_attn.v_scale"
    change = {"zero": torch.zeros(1), "infinite": torch.full((1,), float("inf"))}
    stored = {key: t for key, t in {**stored, name: change.get(damage)}.items() if t is not None}
    save_file(stored, artifact.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"v_scale is not one positive number"):
        load(artifact.path, device="cpu")


def test_other_caches_are_not_read_as_ours(
    tiny: Callable[..., Path], wanted: Callable[..., Recipe], tmp_path: Path
) -> None:
    artifact = pipeline.run(wanted("FP8_DYNAMIC"), model=tiny("llama"), output=tmp_path / "out").artifact
    config = harness.read_json(artifact.path / "config.json")
    config["quantization_config"]["kv_cache_scheme"]["num_bits"] = 4
    (artifact.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="rounds the inputs"):
        load(artifact.path, device="cpu")


def test_bad_requests_are_told_by_name(
    tiny: Callable[..., Path], wanted: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="go with a scheme that rounds inputs, not W4A16"):
        parse_recipe({"stages": [{"method": "rtn", "kv_cache": "fp8"}]})
    with pytest.raises(UserError, match="kv_cache"):
        parse_recipe({"stages": [{"method": "rtn", "scheme": "FP8_DYNAMIC", "kv_cache": "int4"}]})
    planned = pipeline.plan(wanted("FP8_DYNAMIC"), model=tiny("gpt2"), output=tmp_path / "out")
    assert any("no quantised k_proj or qkv_proj" in problem for problem in planned.problems)
