"""A student that learns on what it writes itself, through trl."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact import durable
from compress.errors import UserError, WorkError
from compress.pipeline import distill_stage
from compress.recipe import Recipe, parse_recipe
from compress.recipe_distill import DistillSettings, build_distill_recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from tests.pipeline import harness
from tests.pipeline.killed import killed_midway


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher, and a student that is the teacher with its matrices a little off."""
    teacher = tiny("llama")
    return teacher, harness.a_little_off(teacher, tmp_path_factory.mktemp("pair") / "student")


def recipe(teacher: Path, text: Path, **settings: Any) -> Recipe:
    usual = {"data": str(text), "seq_len": 24, "samples": 44, "steps": 4, "batch_size": 4, "loss": "on-policy"}
    made = build_distill_recipe(DistillSettings(**{"teacher": str(teacher), **usual, **settings}))
    data = made.model_dump()
    data["stages"][0]["method"] |= {"prompt_tokens": 6, "max_tokens": 8}
    return parse_recipe({"stages": data["stages"]})


@pytest.mark.parametrize("settings", [{"full": True, "learning_rate": 2e-3}, {"lora_rank": 4, "learning_rate": 1e-2}])
def test_a_sparse_student_learns_on_its_own_words_and_keeps_its_zeros(
    settings: dict[str, Any], tiny: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    teacher = tiny("llama")
    sparse = build_prune_recipe(PruneSettings(method="magnitude", pattern="2:4"))[0]
    student = pipeline.run(sparse, model=teacher, output=tmp_path / "sparse").artifact
    capsys.readouterr()
    wanted = recipe(teacher, text, **settings)
    made = pipeline.run(wanted, model=student.path, output=tmp_path / "out").artifact
    assert capsys.readouterr().out == "", "what trl logs is not for the terminal"
    learned = made.training()
    assert learned is not None
    assert (len(learned["losses"]), learned["done"], learned["loss"]["kind"]) == (4, 4, "on-policy")
    planned = pipeline.plan(wanted, model=student.path, output=tmp_path / "planned")
    assert planned.tokens_per_step == learned["tokens_per_step"] == 4 * 8, "windows of a batch, tokens that it writes"
    assert learned["written_kl"] < learned["held_out"][0]["kl"]
    before, after = harness.tensors(student.path), harness.tensors(made.path)
    for name in harness.block_matrices(before):
        assert not after[name][before[name] == 0].any(), name
        assert not torch.equal(after[name], before[name]), name
    if "lora_rank" in settings:
        again = pipeline.run(wanted, model=student.path, output=tmp_path / "again").artifact
        assert again.artifact_id == made.artifact_id


@pytest.mark.parametrize("settings", [{"full": True}, {"lora_rank": 4}])
def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(
    settings: dict[str, Any], pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    wanted = recipe(pair[0], text, **settings)
    whole = pipeline.run(wanted, model=pair[1], output=tmp_path / "whole").artifact
    learned = whole.training()
    assert learned is not None
    assert learned["losses"][2:] != learned["losses"][:2], "every step has prompts and draws of its own"
    monkeypatch.setattr(distill_stage, "CHECKPOINT_SECONDS", 0.0)
    for label in ("before write step-000003.safetensors", "before write weights.safetensors"):
        monkeypatch.setattr(durable, "step", harness.failing_at(label))
        with pytest.raises(WorkError, match="the disk is full"):
            pipeline.run(wanted, model=pair[1], output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(durable, "step", lambda label: None)
    result = pipeline.run(wanted, model=pair[1], output=tmp_path / "out")
    assert (result.resumed_blocks, result.computed_blocks) == (4, 0)
    assert result.artifact.artifact_id == whole.artifact_id
    assert result.artifact.training() == learned


@pytest.mark.slow
def test_killed_in_the_middle_it_resumes_to_the_same_bytes(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = recipe(pair[0], text, full=True, steps=20).model_dump()
    data["stages"][0]["patience"] = 20
    wanted = parse_recipe({"stages": data["stages"], "model": str(pair[1])})
    killed_midway(wanted, tmp_path / "out")
    resumed = pipeline.run(wanted, output=tmp_path / "out")
    assert 3 <= resumed.resumed_blocks < 20
    whole = pipeline.run(wanted, output=tmp_path / "whole")
    assert resumed.artifact.artifact_id == whole.artifact.artifact_id
    assert resumed.artifact.training() == whole.artifact.training()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_before(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = pytest.importorskip("trl").DistillationTrainer
    monkeypatch.setattr(distill_stage, "CHECKPOINT_SECONDS", 0.0)
    right = trainer.compute_loss
    calls: list[int] = []

    def broken(self: Any, *given: Any, **named: Any) -> torch.Tensor:
        calls.append(1)
        return right(self, *given, **named) * (torch.nan if len(calls) > 2 else 1.0)

    wanted = recipe(pair[0], text, full=True)
    monkeypatch.setattr(trainer, "compute_loss", broken)
    with pytest.raises(WorkError, match="nan at step 3") as caught:
        pipeline.run(wanted, model=pair[1], output=tmp_path / "out")
    assert "--learning-rate" in caught.value.hint
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(trainer, "compute_loss", right)
    resumed = pipeline.run(wanted, model=pair[1], output=tmp_path / "out")
    assert resumed.resumed_blocks == 2
    whole = pipeline.run(wanted, model=pair[1], output=tmp_path / "whole").artifact
    assert resumed.artifact.artifact_id == whole.artifact_id


def test_without_trl_it_is_refused_with_a_hint(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="needs trl") as caught:
        pipeline.run(recipe(pair[0], text, full=True), model=pair[1], output=tmp_path / "out")
    assert "compress[distill]" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_what_cannot_learn_on_policy_is_refused_before_any_work(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    quantised = parse_recipe(
        {"stages": [{"kind": "quantize", "method": "rtn", "scheme": {"bits": 4, "group_size": 16}}]}
    )
    packed = pipeline.run(quantised, model=pair[0], output=tmp_path / "packed").artifact.path
    with pytest.raises(UserError, match="quantised student cannot learn on-policy"):
        pipeline.run(recipe(pair[0], text), model=packed, output=tmp_path / "out")
    data = recipe(pair[0], text).model_dump()
    data["stages"][0]["method"]["max_tokens"] = 50_000
    with pytest.raises(UserError, match="exceed the student's context"):
        pipeline.run(parse_recipe({"stages": data["stages"]}), model=pair[1], output=tmp_path / "out")
    with pytest.raises(UserError, match="needs `steps`"):
        recipe(pair[0], text, steps=None, minutes=1.0)
