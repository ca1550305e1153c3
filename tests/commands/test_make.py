"""The commands that make artifacts, on the packaged model: what they write, say and leave alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import compress
from compress.artifact.reader import Artifact
from compress.commands import _progress

EVAL = ("--eval-tokens", 2600)  # the fewest that two blocks of windows need
QUICK = ("--samples", 4, "--seq-len", 64)
pytestmark = pytest.mark.usefixtures("one_thread")


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_quantize_makes_a_scored_artifact_and_says_where(run: Callable, tmp_path: Path) -> None:
    result = run("quantize", "--method", "rtn", "--json", *EVAL)
    document = result.json
    artifact = Artifact.open(document["artifact"])
    assert result.code == 0
    assert artifact.path == tmp_path / "artifacts/tales-6m-rtn-w4a16-g128/v1"
    assert document["artifact_id"] == artifact.artifact_id
    assert document["sizes"]["bits_per_weight"] == 4.125
    assert (document["complete_already"], document["computed_blocks"]) == (False, 6)
    assert document["summary"]["kl_mean"]["estimate"] > 0
    assert document["not_scored"] is None
    assert artifact.eval()["artifact_id"] == artifact.artifact_id  # type: ignore[index]
    assert run("list", "--json").json["artifacts"][0]["scores"]["kl_mean"]["value"] > 0
    assert run("verify", artifact.path).code == 0


def test_the_same_command_again_is_complete_and_changes_nothing(run: Callable, copy: Path) -> None:
    before = snapshot(copy)
    result = run("quantize", "--method", "rtn", "--output", copy, *EVAL)
    assert (result.code, result.out) == (0, "copy\n")
    assert "complete already" in result.err
    assert snapshot(copy) == before


def test_a_complete_artifact_without_scores_is_scored_by_the_same_command(run: Callable, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run("quantize", "--method", "rtn", "--output", output, "--no-eval", "--json")
    assert first.json["not_scored"] == "not asked for"
    assert Artifact.open(output).eval() is None
    second = run("quantize", "--method", "rtn", "--output", output, "--json", *EVAL)
    assert second.json["complete_already"] is True
    assert second.json["summary"] is not None
    assert second.json["artifact_id"] == first.json["artifact_id"]


def test_what_cannot_be_scored_here_is_made_and_says_so(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.workflows.quantize.available_memory", lambda device: 1000)
    result = run("quantize", "--method", "rtn", "--output", tmp_path / "out")
    assert result.code == 0
    assert "not scored: it needs about 1.0 GB of memory, 0.0 GB are free" in result.err
    assert run("quantize", "--method", "rtn", "--output", tmp_path / "out", "--json").json["not_scored"]


def test_an_output_that_holds_something_else_is_left_alone(run: Callable, copy: Path, tmp_path: Path) -> None:
    before = snapshot(copy)
    line = run("quantize", "--method", "rtn", "--bits", 3, "--output", copy).refused(2)
    assert "another recipe or source" in line
    assert snapshot(copy) == before
    restarted = run("quantize", "--method", "rtn", "--bits", 3, "--output", copy, "--restart", "--no-eval", "--json")
    assert restarted.code == 0
    assert restarted.json["scheme"] == "w3a16-g128"


def test_plan_and_dry_run_write_nothing(run: Callable, tmp_path: Path) -> None:
    planned = run("plan", "quantize", "--method", "gptq", "--bits", 3, "--json")
    dry = run("quantize", "--method", "gptq", "--bits", 3, "--dry-run", "--json")
    assert planned.code == dry.code == 0
    assert list(tmp_path.iterdir()) == []
    document = planned.json
    assert {key: dry.json[key] for key in document if key != "seconds_estimate"} == {
        key: value for key, value in document.items() if key != "seconds_estimate"
    }
    assert document["bits_per_weight"] == 3.125
    assert len(document["linears"]) == 42
    assert document["output_bytes"] < document["source_bytes"]
    assert document["seconds_estimate"] > 0


def test_a_group_size_that_does_not_divide_names_the_nearest(run: Callable, tmp_path: Path) -> None:
    result = run("quantize", "--method", "rtn", "--group-size", 100)
    assert "group size 100 does not divide the width" in result.refused(2)
    assert "--group-size 128" in result.err
    planned = run("plan", "quantize", "--method", "rtn", "--group-size", 100, "--json")
    assert planned.code == 2
    assert planned.json["problems"]
    assert "error: the plan has" in planned.err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_resumes(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    words = ("quantize", "--method", "gptq", "--output", output, "--no-eval", "--quiet", *QUICK)
    steps = []

    def interrupt(self: object, note: str = "") -> None:
        steps.append(note)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(_progress.QuietProgress, "advance", interrupt)
        result = run(*words)
    assert result.refused(130) == "error: interrupted"
    assert "resumes" in result.err
    assert not output.exists()
    document = run(*words, "--json").json
    assert (document["resumed_blocks"], document["computed_blocks"]) == (3, 3)


def test_the_recipe_of_an_artifact_makes_the_same_bytes(run: Callable, tmp_path: Path) -> None:
    first = run("quantize", "--method", "gptq", "--bits", 3, *QUICK, "--output", tmp_path / "a", "--no-eval", "--json")
    again = run("run", tmp_path / "a/recipe.yaml", "--output", tmp_path / "b", "--no-eval", "--json")
    assert again.json["artifact_id"] == first.json["artifact_id"]
    same = run("diff", "a", "b", "--json")
    assert (same.code, same.json["same"], same.json["tensors"]) == (0, True, [])
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_shipped_recipe_runs_by_name_with_overrides(run: Callable, tmp_path: Path) -> None:
    sets = ("--set", "stages.0.calibration.samples=4", "--set", "stages.0.calibration.seq_len=64")
    words = ("awq-w4-g128", *sets, "--set", "stages.0.scheme.group_size=64")
    assert run("plan", "run", *words, "--json").json["bits_per_weight"] == 4.25
    document = run("run", *words, "--output", tmp_path / "out", "--no-eval", "--json").json
    assert (document["method"], document["scheme"]) == ("awq", "w4a16-g64")
    assert "there is no shipped recipe 'awq-w5'" in run("run", "awq-w5").refused(2)


def test_a_model_without_a_tokenizer_is_quantised_and_not_scored(run: Callable, tmp_path: Path) -> None:
    model = Path(shutil.copytree(compress.default_model(), tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    result = run("quantize", model, "--method", "rtn", "--output", "out", "--json")
    assert result.code == 0
    assert result.json["summary"] is None
    assert "tokenizer" in result.json["not_scored"]
    assert "tokenizer" in run("quantize", model, "--method", "gptq", "--output", "two").refused(2)
