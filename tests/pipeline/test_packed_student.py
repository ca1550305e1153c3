"""A quantised student learns behind its codes: the same scheme and bytes, exact at the start, zeros kept."""

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
from compress.models.checkpoint import Checkpoint
from compress.pipeline import distill_stage, packed_student
from compress.recipe import Recipe, parse_recipe
from compress.recipe_distill import DistillSettings, build_distill_recipe
from compress.workflows import stages
from tests.pipeline import harness

QUANTIZE: dict[str, Any] = {"kind": "quantize", "method": "rtn", "scheme": {"bits": 3, "group_size": 16}}


@pytest.fixture(scope="module")
def quantized(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model at 3 bits."""
    wanted = parse_recipe({"stages": [QUANTIZE]})
    return pipeline.run(wanted, model=tiny("llama"), output=tmp_path_factory.mktemp("w3") / "out").artifact


def recipe(teacher: Path, text: Path, **settings: Any) -> Recipe:
    usual = {"data": str(text), "seq_len": 24, "samples": 44, "steps": 6, "batch_size": 4}
    return build_distill_recipe(DistillSettings(**{"teacher": str(teacher), **usual, **settings}))


@pytest.mark.parametrize("settings", [{"full": True, "learning_rate": 3e-3}, {"lora_rank": 4, "learning_rate": 1e-2}])
def test_codes_learn_and_scheme_scales_and_bytes_stay(
    settings: dict[str, Any], quantized: Artifact, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    made = pipeline.run(
        recipe(tiny("llama"), text, steps=10, **settings), model=quantized.path, output=tmp_path / "out"
    ).artifact
    learned = made.training()
    assert learned is not None
    assert learned["written_kl"] < 0.995 * learned["held_out"][0]["kl"]
    before, after = harness.tensors(quantized.path), harness.tensors(made.path)
    assert before.keys() == after.keys()
    codes = [name for name in before if name.endswith(".weight_packed")]
    assert codes
    assert any(not torch.equal(before[name], after[name]) for name in codes)
    for name in before:
        if name.endswith((".weight_scale", ".weight_shape")):
            assert torch.equal(before[name], after[name]), name
    assert Checkpoint.open(made.path).config == Checkpoint.open(quantized.path).config
    assert made.manifest.sizes.bits_per_weight == quantized.manifest.sizes.bits_per_weight
    assert made.manifest.sizes.parameters == quantized.manifest.sizes.parameters
    assert [parent.stage for parent in made.manifest.parents] == ["quantize", "teach", "distill"]
    assert verify(made.path).ok
    ids = torch.arange(20)[None]
    dense = packed_student.opened(Checkpoint.open(made.path))
    loaded = harness.loaded_logits(made.path, ids)
    model = distill_stage.load_plain(tiny("llama"), torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(dense.read(name))
        assert torch.allclose(model(ids).logits, loaded, atol=1e-4)


def test_experts_learn_behind_their_codes(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    teacher = tiny("mixtral")
    packed = pipeline.run(parse_recipe({"stages": [QUANTIZE]}), model=teacher, output=tmp_path / "w3").artifact
    wanted = recipe(teacher, text, full=True, learning_rate=5e-3, steps=10)
    made = pipeline.run(wanted, model=packed.path, output=tmp_path / "out").artifact
    learned = made.training()
    assert learned is not None
    assert learned["written_kl"] < learned["held_out"][0]["kl"]
    before, after = harness.tensors(packed.path), harness.tensors(made.path)
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name and name.endswith(".weight_packed")]
    assert len(experts) == 2 * 8 * 3
    assert any(not torch.equal(before[name], after[name]) for name in experts)
    assert verify(made.path).ok


def test_before_the_first_step_it_is_the_artifact_and_a_stopped_run_resumes(
    quantized: Artifact, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(tiny("llama"), text, full=True, learning_rate=1e-9, steps=2)
    still = pipeline.run(wanted, model=quantized.path, output=tmp_path / "still").artifact
    before, after = harness.tensors(quantized.path), harness.tensors(still.path)
    assert all(torch.equal(before[name], after[name]) for name in before if ".weight_packed" in name)
    wanted = recipe(tiny("llama"), text, full=True, learning_rate=1e-2, steps=4)
    whole = pipeline.run(wanted, model=quantized.path, output=tmp_path / "whole").artifact
    monkeypatch.setattr(distill_stage, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(durable, "step", harness.failing_at("before write step-000002.safetensors"))
    with pytest.raises(WorkError, match="disk is full"):
        pipeline.run(wanted, model=quantized.path, output=tmp_path / "out")
    monkeypatch.setattr(durable, "step", lambda label: None)
    resumed = pipeline.run(wanted, model=quantized.path, output=tmp_path / "out")
    assert resumed.resumed_blocks == 1
    assert resumed.artifact.artifact_id == whole.artifact_id


@pytest.mark.parametrize("rank", [0, 4])
def test_zeros_of_a_student_that_was_pruned_and_quantised_stay(
    rank: int, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    prune = {"kind": "prune", "method": "magnitude", "pattern": "2:4"}
    quantise = {**QUANTIZE, "scheme": {"bits": 4, "group_size": 16}}
    learn = recipe(tiny("llama"), text, lora_rank=rank or None, full=not rank, learning_rate=1e-2).model_dump()
    learn["stages"][0]["teacher"] = None
    wanted = parse_recipe({"stages": [prune, quantise, *learn["stages"]]})
    options: dict[str, Any] = {"device": "cpu", "restart": False, "scored": False, "progress": None}
    made = stages.run(wanted, model=tiny("llama"), output=tmp_path / "out", **options).run.artifact
    learned = made.training()
    assert learned is not None
    assert learned["written_kl"] < learned["held_out"][0]["kl"]
    assert learned["zeros"] > 0
    (second,) = (tmp_path / "out.stages").glob("2-*")
    before, after = (packed_student.opened(Checkpoint.open(path)) for path in (second, made.path))
    for layer in made.layers():
        name = f"{layer['name']}.weight"
        assert not after.read(name)[before.read(name) == 0].any()
    assert [parent.stage for parent in made.manifest.parents] == ["prune", "quantize", "teach", "distill"]


def test_codes_that_cannot_be_trained_are_refused(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    for number, scheme in enumerate(("W8A8", "FP8_DYNAMIC")):
        other = parse_recipe({"stages": [{"kind": "quantize", "method": "rtn", "scheme": scheme}]})
        student = pipeline.run(other, model=tiny("llama"), output=tmp_path / f"student{number}").artifact.path
        with pytest.raises(UserError, match="cannot be trained: only integer weights") as caught:
            pipeline.run(recipe(tiny("llama"), text), model=student, output=tmp_path / "out")
        assert "float model" in caught.value.hint
    own = pipeline.run(parse_recipe({"stages": [QUANTIZE]}), model=tiny("gpt2"), output=tmp_path / "own").artifact.path
    with pytest.raises(UserError, match="our own reader"):
        pipeline.run(recipe(tiny("gpt2"), text), model=own, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
