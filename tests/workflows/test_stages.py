"""Runs of several stages: lineage, resume, what is reused, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import durable
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import UserError, WorkError
from compress.recipe import Recipe, load_recipe, parse_recipe
from compress.workflows.quantize import quantize
from tests.pipeline import harness


@pytest.fixture
def chain(text: Path) -> Callable[..., Recipe]:
    """chain(bits): a width cut, a short distillation, and rounding to so many bits."""

    def make(bits: int = 4, **learn: Any) -> Recipe:
        source = str(text)
        cut = {"kind": "prune", "method": "width", "keep": 0.8}
        cut["calibration"] = {"source": source, "samples": 4, "seq_len": 24}  # type: ignore[assignment]
        learned = {"kind": "distill", "lora_rank": 0, "steps": 3, "batch_size": 4, **learn}
        learned["calibration"] = {"source": source, "samples": 44, "seq_len": 24}
        rounded = {"kind": "quantize", "method": "rtn", "scheme": {"bits": bits, "group_size": "channel"}}
        return parse_recipe({"stages": [cut, learned, rounded]})

    return make


def steps_of(folder: Path) -> list[str]:
    return sorted(entry.name.rsplit("-", 1)[0] for entry in folder.iterdir())


def test_stages_follow_each_other_with_one_lineage(
    chain: Callable[..., Recipe], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, output = tiny("llama"), tmp_path / "out"
    done = quantize(chain(), model=model, output=output, evaluate=False)
    manifest = done.artifact.manifest
    assert [parent.stage for parent in manifest.parents] == ["prune", "teach", "distill", "quantize"]
    assert manifest.parents[0].name == model.name
    assert manifest.parents[0].digest == manifest.parents[1].digest, "the teacher is what the run began with"
    assert (done.artifact.method, done.artifact.scheme) == ("width+forward-kl+rtn", "w4a16-channel")
    assert steps_of(tmp_path / "out.stages") == ["1-width", "2-forward-kl"]
    learned = next(path for path in (tmp_path / "out.stages").iterdir() if "forward-kl" in path.name)
    assert Artifact.open(learned).manifest.artifact_id != manifest.artifact_id
    assert verify(output).ok
    assert manifest.sizes.ratio_to_root < manifest.sizes.ratio_to_parent < 1
    again = quantize(load_recipe(output / "recipe.yaml"), output=tmp_path / "again", evaluate=False)
    assert again.artifact.artifact_id == done.artifact.artifact_id
    assert quantize(chain(), model=model, output=output, evaluate=False).complete_already


def test_minutes_become_steps_in_the_recipe_of_the_whole(
    chain: Callable[..., Recipe], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = chain(minutes=0.01, steps=None)
    done = quantize(wanted, model=tiny("llama"), output=tmp_path / "out", evaluate=False)
    resolved = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert resolved.stages[1].steps >= 1  # type: ignore[union-attr, operator]
    assert resolved.hash() == wanted.hash() == done.artifact.manifest.recipe_hash


def test_a_run_that_stopped_and_one_with_another_last_stage_do_only_what_is_missing(
    chain: Callable[..., Recipe], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = tiny("llama"), tmp_path / "out"
    monkeypatch.setattr(durable, "step", harness.failing_at("before write block-00001.safetensors"))
    with pytest.raises(WorkError, match="disk is full"):
        quantize(chain(), model=model, output=output, evaluate=False)
    assert not output.exists()
    monkeypatch.setattr(durable, "step", lambda label: None)
    first = quantize(chain(), model=model, output=output, evaluate=False)
    made = {entry.name: entry.stat().st_mtime_ns for entry in (tmp_path / "out.stages").iterdir()}
    with pytest.raises(UserError, match="another recipe"):
        quantize(chain(8), model=model, output=output, evaluate=False)
    assert {entry.name: entry.stat().st_mtime_ns for entry in (tmp_path / "out.stages").iterdir()} == made
    whole = quantize(chain(), model=model, output=tmp_path / "whole", evaluate=False)
    assert whole.artifact.artifact_id == first.artifact.artifact_id


def test_without_an_output_all_stages_lie_together(
    chain: Callable[..., Recipe], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    first = quantize(chain(), model=model, evaluate=False)
    family = tmp_path / "artifacts" / f"{model.name}-width-forward-kl-rtn-w4a16-channel"
    assert first.artifact.path == family / "v1"
    assert steps_of(family / "stages") == ["1-width", "2-forward-kl"]


def test_what_a_later_stage_cannot_do_is_refused_before_the_first(
    chain: Callable[..., Recipe], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    data = chain().model_dump()
    data["stages"][2]["scheme"]["group_size"] = 64
    with pytest.raises(UserError, match=r"stage 3 \(quantize\): group size 64 does not divide the width") as refused:
        quantize(parse_recipe(data), model=tiny("llama"), output=tmp_path / "out", evaluate=False)
    assert "--group-size" in refused.value.hint
    assert list(tmp_path.iterdir()) == []


def test_nothing_comes_after_quantising(
    chain: Callable[..., Recipe], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = chain()
    backwards = recipe.model_copy(update={"stages": recipe.stages[::-1]})
    with pytest.raises(UserError, match="stage 0 of the recipe quantises"):
        quantize(backwards, model=tiny("llama"), output=tmp_path / "out", evaluate=False)
    assert list(tmp_path.iterdir()) == []
