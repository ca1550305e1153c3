"""Sequence-level distillation: the teacher answers, once, and the student learns the answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import pipeline
from compress.artifact import durable
from compress.errors import UserError, WorkError
from compress.recipe import Recipe, load_recipe, parse_recipe
from compress.runtime import loading
from compress.workflows import answers, stages
from tests.pipeline import harness


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher, and a student that is the teacher with its matrices a little off."""
    teacher = tiny("llama")
    return teacher, harness.a_little_off(teacher, tmp_path_factory.mktemp("pair") / "student")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{number} kings went to {number % 7} woods\n" for number in range(70)))
    return path


def recipe(pair: tuple[Path, Path], prompts: Path, **given: Any) -> Recipe:
    text = {"source": str(prompts), "seq_len": 48, "held_out": 4, "answers": {"max_tokens": 12}}
    stage = {"kind": "distill", "teacher": str(pair[0]), "steps": 6, "lora_rank": 0, "batch_size": 4}
    return parse_recipe(
        {"model": str(pair[1]), "stages": [{**stage, "learning_rate": 2e-3, "calibration": text, **given}]}
    )


def run(wanted: Recipe, output: Path) -> Any:
    return answers.run(wanted, model=None, output=output, device="cpu", progress=None).artifact


def test_the_student_learns_answers_that_are_written_once(
    pair: tuple[Path, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = harness.snapshot(tmp_path)
    plan = pipeline.plan(recipe(pair, prompts), output=tmp_path / "out")
    assert harness.snapshot(tmp_path) == before, "a plan asks nobody"
    assert isinstance(plan, pipeline.DistillPlan)
    made = run(recipe(pair, prompts), tmp_path / "out")
    learned = made.training()
    assert learned["written_kl"] < learned["held_out"][0]["kl"]
    assert 0 < learned["held_out_tokens"] <= 4 * 3 * 12, "at most three pairs fit in a window, and answers alone count"
    assert plan.windows + plan.held_out >= made.manifest.calibration.samples
    assert made.manifest.calibration.name == f"prompts, answered by {pair[0].name}"
    resolved = load_recipe(made.path / "recipe.yaml")
    assert resolved.hash() == made.manifest.recipe_hash

    def nobody(*given: Any, **more: Any) -> Any:
        raise AssertionError("it was answered before")

    monkeypatch.setattr(loading, "load", nobody)
    assert run(resolved, tmp_path / "out").artifact_id == made.artifact_id, "complete already"
    (tmp_path / "plain.answers").symlink_to(tmp_path / "out.answers")
    plain = run(recipe(pair, prompts, method="ce", steps=18), tmp_path / "plain").training()
    assert sum(plain["losses"][-6:]) < sum(plain["losses"][:6]), "of one batch more than of another; of six less"


def test_answering_that_stops_anywhere_goes_on_to_the_same_bytes(
    pair: tuple[Path, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(pair, prompts)
    whole = run(wanted, tmp_path / "whole")
    monkeypatch.setattr(durable, "step", harness.failing_at("before write shard-00001.safetensors"))
    with pytest.raises(WorkError, match="the disk is full"):
        run(wanted, tmp_path / "out")
    monkeypatch.setattr(durable, "step", lambda label: None)
    assert len(list((tmp_path / "out.answers").glob("*/shard-*"))) == 1
    assert run(wanted, tmp_path / "out").artifact_id == whole.artifact_id


def test_a_stage_of_several_asks_the_model_that_the_run_begins_with(
    pair: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    data = recipe(pair, prompts).model_dump()
    data["stages"][0]["teacher"] = None
    prune = {"kind": "prune", "method": "magnitude", "sparsity": 0.5}
    wanted = parse_recipe({"model": str(pair[0]), "stages": [prune, *data["stages"]]})
    options: dict[str, Any] = {"model": None, "device": "cpu", "restart": False, "scored": False, "progress": None}
    made = stages.run(wanted, output=tmp_path / "out", **options).run.artifact
    assert made.manifest.calibration is not None
    assert made.manifest.calibration.name == f"prompts, answered by {pair[0].name}"


def test_prompts_that_cannot_be_learned_from_are_refused(
    pair: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        run(recipe(pair, empty), tmp_path / "out")
    few = tmp_path / "few.txt"
    few.write_text("A king\nA queen\n")
    with pytest.raises(UserError, match="too few"):
        run(recipe(pair, few), tmp_path / "out")
    text = {"source": str(prompts), "seq_len": 100_000, "answers": True}
    with pytest.raises(UserError, match="exceed the models' context"):
        run(recipe(pair, prompts, calibration=text), tmp_path / "out")
    assert not (tmp_path / "out").exists()
