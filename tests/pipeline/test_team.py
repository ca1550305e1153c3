"""Several processes share a training: the same bytes as one, also after a kill; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact import durable
from compress.cli import main
from compress.distillation.processes import refuse_launched, shared_by, wanted
from compress.errors import UserError, WorkError
from compress.pipeline import distill_stage, helpers
from compress.recipe import Recipe
from compress.recipe_distill import DistillSettings, build_distill_recipe
from tests.pipeline import harness


@pytest.fixture(scope="module")
def student(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.a_little_off(tiny("llama"), tmp_path_factory.mktemp("team") / "student")


def recipe(teacher: Path, text: Path, **settings: Any) -> Recipe:
    usual = {"data": str(text), "seq_len": 24, "samples": 44, "steps": 4, "batch_size": 8}
    return build_distill_recipe(DistillSettings(**{"teacher": str(teacher), **usual, **settings}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, {"lora_rank": 4}),
        (3, {"full": True, "loss": "hidden"}),
        (2, {"full": True, "loss": "topk-kl", "cache": "kept"}),
    ],
)
def test_several_processes_make_the_bytes_of_one(
    count: int,
    settings: dict[str, Any],
    student: Path,
    tiny: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    if "cache" in settings:
        settings = {**settings, "cache": str(tmp_path / "kept")}
    wanted_recipe = recipe(tiny("llama"), text, **settings)
    alone = pipeline.run(wanted_recipe, model=student, output=tmp_path / "alone").artifact
    with shared_by(count):
        shared = pipeline.run(wanted_recipe, model=student, output=tmp_path / "shared").artifact
    assert shared.artifact_id == alone.artifact_id
    assert shared.training() == alone.training()
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_a_helper_that_dies_ends_the_run_and_the_next_one_resumes(
    student: Path, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted_recipe, output = recipe(tiny("llama"), text, full=True), tmp_path / "out"
    monkeypatch.setattr(distill_stage, "CHECKPOINT_SECONDS", 0.0)
    running: list[Any] = []
    start = helpers._start
    monkeypatch.setattr(helpers, "_start", lambda meeting: running.append(start(meeting)) or running[-1])

    def kill(label: str) -> None:
        if label == "before write step-000002.safetensors":
            running[0].kill()

    monkeypatch.setattr(durable, "step", kill)
    with shared_by(2), pytest.raises(WorkError, match="a helper process of the training ended: exit code -9"):
        pipeline.run(wanted_recipe, model=student, output=output)
    assert not output.exists()
    monkeypatch.setattr(durable, "step", lambda label: None)
    resumed = pipeline.run(wanted_recipe, model=student, output=output)
    assert resumed.resumed_blocks == 2
    whole = pipeline.run(wanted_recipe, model=student, output=tmp_path / "whole").artifact
    assert resumed.artifact.artifact_id == whole.artifact_id


def test_what_cannot_be_shared_is_refused_before_any_work(
    student: Path, tiny: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with shared_by(5), pytest.raises(UserError, match="8 windows is shared by 4 processes at most, not 5"):
        pipeline.run(recipe(tiny("llama"), text), model=student, output=tmp_path / "out")
    with shared_by(2), pytest.raises(UserError, match="on-policy trains in one process"):
        pipeline.run(recipe(tiny("llama"), text, loss="on-policy"), model=student, output=tmp_path / "out")
    assert wanted() == 1
    alone = pipeline.plan(recipe(tiny("llama"), text), model=student, output=tmp_path / "out")
    with shared_by(2):
        shared = pipeline.plan(recipe(tiny("llama"), text), model=student, output=tmp_path / "out")
    assert shared.peak_memory_bytes == 2 * alone.peak_memory_bytes, "every process holds both models"
    words = ["distill", "--teacher", str(tiny("llama")), "--student", str(student), "--data", str(text), "--steps", "2"]
    words += ["--seq-len", "24", "--output", str(tmp_path / "out"), "--processes", "5"]
    assert main(words) == 2
    assert "shared by 4 processes at most" in capsys.readouterr().err
    assert main(["plan", *words]) == 2, "a plan says so too"
    assert "shared by 4 processes at most" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["distill", "quantize"])
def test_several_that_cannot_meet_are_refused_and_told_what_shares_a_training(
    command: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--student", str(student), "--steps", "2"] if command == "distill" else [str(student), "--bits", "4"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, *model, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "started compress 2 times at once" in said
    assert "--processes 2" in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_launched()
