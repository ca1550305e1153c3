"""Refining: the same format and bytes, a lower KL on windows that taught nothing, deterministic and resumable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact import durable
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import UserError, WorkError
from compress.pipeline import refine
from compress.pipeline.resolve import resolve
from compress.recipe import Recipe, parse_recipe
from compress.runtime.transformers_backend import load
from tests.pipeline import harness
from tests.tiny_models import tiny_tokens

SETTINGS = {"steps": 24, "windows": 8, "checks": 8}
SAMPLES, HELD = 64, 8


def recipe(
    method: str, text: Path, refined: dict[str, Any] | None = SETTINGS, overrides: Any = None, **settings: Any
) -> Recipe:
    """2 bits in groups of 16 unless said otherwise, calibrated on 64 windows, of which the last eight are held out.

    options: settings of the method.
    """
    options = settings.pop("options", {})
    layout = {} if "scheme" in settings else {"bits": 2, "group_size": 16}
    wanted = harness.recipe(method, text, **{**layout, "samples": SAMPLES, **settings})
    data = wanted.model_dump(mode="json")
    data["stages"][0]["method"] |= options
    data["stages"][0] |= {"refine": refined, "overrides": overrides or []}
    data["stages"][0]["calibration"] = {"source": str(text), "samples": settings.get("samples", SAMPLES), "seq_len": 24}
    if refined is None and method in ("rtn", "hqq"):
        data["stages"][0]["calibration"] = None
    return parse_recipe(data)


@pytest.fixture
def make(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> Callable[..., Artifact]:
    """make(method, family="llama", **settings): an artifact of a tiny model."""
    count = 0

    def made(method: str = "gptq", family: str = "llama", **settings: Any) -> Artifact:
        nonlocal count
        count += 1
        return pipeline.run(recipe(method, text, **settings), model=tiny(family), output=tmp_path / str(count)).artifact

    return made


def divergence(source: Path, artifact: Artifact, tokens: torch.Tensor) -> float:
    """Mean KL of the source's model to the artifact's, by transformers and compressed-tensors alone."""
    wanted = harness.source_logits(source, tokens).double().log_softmax(-1)
    found = harness.fake_quantized_logits(source, artifact, tokens).double().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def calibration_tokens(wanted: Recipe, source: Path, output: Path) -> torch.Tensor:
    calibration = resolve(wanted, model=source, output=output, device="auto").calibration
    assert calibration is not None
    return calibration.tokens


@pytest.mark.parametrize(
    ("method", "family", "settings"),
    [
        ("gptq", "llama", {}),
        ("rtn", "qwen2", {"symmetric": False}),
        ("hqq", "llama", {"symmetric": False}),
        ("awq", "gpt2", {}),
        ("gptq", "gemma2", {"symmetric": False}),
        ("smoothquant", "llama", {"scheme": "W8A8"}),
        ("hadamard", "llama", {}),
        ("autoround", "llama", {"options": {"steps": 8}}),
        ("gptq", "llama", {"overrides": [{"linears": ["*.down_proj"], "scheme": {"bits": 3, "group_size": 32}}]}),
    ],
)
def test_same_format_and_a_lower_divergence(
    method: str, family: str, settings: dict[str, Any], make: Callable[..., Artifact], tiny: Callable[..., Path],
    text: Path, tmp_path: Path,
) -> None:  # fmt: skip
    plain, refined = make(method, family, refined=None, **settings), make(method, family, **settings)
    before, after = harness.tensors(plain.path), harness.tensors(refined.path)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name, entry in refined.manifest.ledger.items() if entry.action == "trained"}
    assert norms
    assert moved
    assert moved <= norms | {name for name in before if name.endswith(".weight_scale")}, "codes and zero points stay"
    assert verify(refined.path).ok
    source = tiny(family)
    tokens = calibration_tokens(recipe(method, text, **settings), source, tmp_path / "none")[-HELD:]
    details = [layer["details"]["refined"] for layer in refined.layers() if layer["scheme"]]
    assert len(details) == sum(layer["scheme"] is not None for layer in refined.layers())
    rounds_inputs = "scheme" in settings
    found = divergence(source, refined, tokens), divergence(source, plain, tokens)
    assert found[0] < found[1]
    if not rounds_inputs:  # a rounding that lies on the edge falls either way
        torch.testing.assert_close(found, (details[0]["kl_after"], details[0]["kl_before"]), rtol=1e-3, atol=1e-6)
    probe = tiny_tokens(2, 12)
    expected = harness.fake_quantized_logits(source, refined, probe)
    if family != "gpt2" and not rounds_inputs:  # GPT-2's layout is for our own reader
        torch.testing.assert_close(harness.loaded_logits(refined.path, probe), expected, rtol=1e-5, atol=1e-5)
    if not rounds_inputs:
        torch.testing.assert_close(load(refined.path, device="cpu").score(probe), expected, rtol=1e-5, atol=1e-5)


def test_it_holds_on_other_text(make: Callable[..., Artifact], tiny: Callable[..., Path]) -> None:
    other, source = tiny_tokens(16, 24, seed=5), tiny("llama")
    refined, plain = make(), make(refined=None)
    assert divergence(source, refined, other) < divergence(source, plain, other)


@pytest.mark.parametrize(("method", "options"), [("gptq", {}), ("autoround", {"steps": 8})])
def test_codes_and_zero_points_move_where_that_helps_on_held_out_windows(
    method: str, options: dict[str, Any], make: Callable[..., Artifact], tiny: Callable[..., Path], text: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    still = {**SETTINGS, "scale_rate": 0.0, "norm_rate": 0.0}
    settings: dict[str, Any] = {"symmetric": False, "options": options}
    plain = make(method, refined=None, **settings)
    moved = make(method, refined={**still, "code_rounds": 3}, **settings)
    before, after = harness.tensors(plain.path), harness.tensors(moved.path)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    other = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert "weight_packed" in other
    assert other <= {"weight_packed", "weight_zero_point"}, "scales and norms were to stay"
    assert verify(moved.path).ok
    tokens = calibration_tokens(recipe(method, text, **settings), tiny("llama"), tmp_path / "none")[-HELD:]
    refined = moved.layers()[0]["details"]["refined"]
    found = divergence(tiny("llama"), moved, tokens), divergence(tiny("llama"), plain, tokens)
    assert found[0] < found[1]
    torch.testing.assert_close(found, (refined["kl_after"], refined["kl_before"]), rtol=1e-3, atol=1e-6)
    assert 0 < max(layer["details"]["refined"]["codes_moved"] for layer in moved.layers()) < 0.2
    probe = tiny_tokens(2, 12)
    expected = harness.fake_quantized_logits(tiny("llama"), moved, probe)
    torch.testing.assert_close(load(moved.path, device="cpu").score(probe), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_moved_codes_leave_pruned_weights_at_zero(symmetric: bool, make: Callable[..., Artifact]) -> None:
    settings: dict[str, Any] = {"options": {"pattern": "2:4"}, "symmetric": symmetric}
    plain = harness.decoded(make(refined=None, **settings))
    moved = harness.decoded(make(refined={**SETTINGS, "code_rounds": 2}, **settings))
    names = [name for name in plain if name.endswith("_proj.weight")]
    assert any(not torch.equal(plain[name] == 0, moved[name] == 0) or not torch.equal(plain[name], moved[name])
               for name in names)  # fmt: skip
    assert all((moved[name][plain[name] == 0] == 0).all() for name in names)


def test_reports_are_measured_on_what_was_refined(make: Callable[..., Artifact], tiny: Callable[..., Path]) -> None:
    refined, source = make(), harness.tensors(tiny("llama"))
    values = harness.decoded(refined)
    for layer in refined.layers():
        name = f"{layer['name']}.weight"
        weight, noise = source[name], source[name] - values[name]
        sqnr = 10 * torch.log10(weight.square().sum() / noise.square().sum())
        torch.testing.assert_close(layer["weight_sqnr_db"], float(sqnr), rtol=1e-4, atol=1e-4)
        assert 0 < layer["output_error"] < 1
        assert layer["details"]["refined"]["scale_change_rms"] > 0


def test_threads_and_repetition_change_no_byte(make: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.pipeline.tuned_model.BATCH_TOKENS", 48)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    torch.set_num_threads(1)
    few = {**SETTINGS, "steps": 6, "checks": 2, "code_rounds": 1}
    first = make(refined=few)
    torch.set_num_threads(3)
    again = make(refined=few)
    torch.set_num_threads(1)
    assert harness.snapshot(again.path) == harness.snapshot(first.path)


def test_it_resumes_before_and_behind_itself(
    make: Callable[..., Artifact], tiny: Callable[..., Path], text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected, source, output = make(), tiny("llama"), tmp_path / "out"
    wanted = recipe("gptq", text)
    for label in ("before write refine.safetensors", "before write layers.json"):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "step", harness.failing_at(label))
            with pytest.raises(WorkError, match="full"):
                pipeline.run(wanted, model=source, output=output)
        assert not output.exists()
    monkeypatch.setattr(refine, "refine", None)  # what is done is not done again
    result = pipeline.run(wanted, model=source, output=output)
    assert result.computed_blocks == 0
    assert result.artifact.artifact_id == expected.artifact_id
    assert harness.tensor_hashes(result.artifact) == harness.tensor_hashes(expected)


def test_what_does_not_help_is_left_out_and_said(make: Callable[..., Artifact]) -> None:
    still = {**SETTINGS, "scale_rate": 0.0, "norm_rate": 0.0}
    refined, plain = make(refined=still), make(refined=None)
    assert harness.tensor_hashes(refined) == harness.tensor_hashes(plain)
    assert [f.action for f in refined.manifest.fallbacks if f.name == "refine"] == ["left as it was"]
    assert all("refined" not in layer["details"] for layer in refined.layers())


def test_experts_are_refined(make: Callable[..., Artifact], tiny: Callable[..., Path]) -> None:
    refined = make("gptq", "mixtral")
    assert verify(refined.path).ok
    assert all(layer["output_error"] is None for layer in refined.layers() if ".experts." in layer["name"])
    assert all("refined" in layer["details"] for layer in refined.layers() if ".experts." in layer["name"])
    probe = tiny_tokens(2, 12)
    expected = harness.fake_quantized_logits(tiny("mixtral"), refined, probe)
    torch.testing.assert_close(load(refined.path, device="cpu").score(probe), expected, rtol=1e-5, atol=1e-5)


def test_the_plan_states_the_memory(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    plans = [
        pipeline.plan(recipe("gptq", text, refined), model=tiny("llama"), output=tmp_path / "out")
        for refined in (None, SETTINGS)
    ]
    assert all(isinstance(plan, pipeline.Plan) for plan in plans)
    plain, refined = plans
    assert plain.refine_memory_bytes is None  # type: ignore[union-attr]
    assert refined.peak_memory_bytes >= refined.refine_memory_bytes > 0  # type: ignore[union-attr,operator]
    assert refined.output_bytes == plain.output_bytes
    assert refined.seconds_estimate > plain.seconds_estimate


def test_too_few_windows_are_refused(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves none to learn from"):
        pipeline.run(recipe("gptq", text, samples=1), model=tiny("llama"), output=tmp_path / "out")
