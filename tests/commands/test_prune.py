"""`compress prune` on the packaged model: what it makes, says, plans and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifact.reader import Artifact

QUICK = ("--samples", 4, "--seq-len", 64)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_prune_makes_a_scored_artifact_and_says_where(run: Callable, tmp_path: Path) -> None:
    result = run("prune", "--method", "magnitude", "--json")
    document = result.json
    artifact = Artifact.open(document["artifact"])
    assert result.code == 0
    assert artifact.path == tmp_path / "artifacts/tales-6m-magnitude-sparse50/v1"
    assert (document["method"], document["scheme"]) == ("magnitude", "sparse50")
    assert document["zeros"]["share"] == 0.5
    assert document["summary"]["kl_mean"]["estimate"] > 0
    assert artifact.eval() is not None
    assert "of which" in (artifact.path / "README.md").read_text()
    assert run("verify", artifact.path).code == 0
    shown = run("list", "--json").json["artifacts"][0]
    assert shown["scheme"] == "sparse50"
    assert "42 pruned, 0 left as they were" in run("show", artifact.path).out


def test_no_eval_output_restart_and_seed(run: Callable, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ("prune", "--method", "wanda", "--pattern", "2:4", *QUICK, "--no-eval", "--output", output)
    first = run(*words)
    assert run(*words, "--json").json["complete_already"]
    assert (first.code, first.out.strip()) == (0, "out")
    assert "zeros in the pruned linears" in first.err
    assert Artifact.open(output).eval() is None
    assert run(*words, "--seed", 1).code == 2
    second = run(*words, "--seed", 1, "--restart", "--json")
    assert second.code == 0
    assert Artifact.open(output).artifact_id == second.json["artifact_id"]
    assert Artifact.open(output).manifest.calibration.seed == 1  # type: ignore[union-attr]


def test_a_width_cut_prints_what_was_asked_and_what_was_achieved(run: Callable, tmp_path: Path) -> None:
    output = tmp_path / "narrow"
    planned = run("plan", "prune", "--keep", 0.75, "--json").json
    assert (planned["method"], planned["keep"]) == ("width", 0.75)
    assert 0.74 < planned["achieved"] <= 0.75
    assert "asked 0.75" in run("plan", "prune", "--keep", 0.75).out
    made = run("prune", "--keep", 0.75, *QUICK, "--no-eval", "--output", output)
    assert made.code == 0
    assert "parameters kept" in made.err
    manifest = Artifact.open(output).manifest
    assert manifest.sizes.parameters == planned["cut"]["parameters"]
    assert manifest.sizes.bytes == pytest.approx(planned["output_bytes"], rel=0.01)
    plain = tmp_path / "plain"
    assert run("prune", "--keep", 0.75, "--no-repair", *QUICK, "--no-eval", "--output", plain).code == 0
    actions = {entry.action for entry in Artifact.open(plain).manifest.ledger.values()}
    assert "pruned" in actions
    assert "repaired" not in actions
    assert {entry.action for entry in manifest.ledger.values()} >= {"pruned", "repaired", "kept"}


def test_dry_run_is_the_plan_and_writes_nothing(run: Callable, tmp_path: Path) -> None:
    words = ("--method", "sparsegpt", "--sparsity", 0.3, "--json")
    planned, dry = run("plan", "prune", *words), run("prune", *words, "--dry-run")
    assert (planned.code, dry.code) == (0, 0)
    assert planned.json.keys() == dry.json.keys()
    assert {**planned.json, "seconds_estimate": 0} == {**dry.json, "seconds_estimate": 0}
    assert planned.json["sparsity"] == "30%"
    assert planned.json["zeros"] == pytest.approx(0.3 * 6 * 786432, rel=1e-3)
    assert not (tmp_path / "artifacts").exists()
    assert "zeros take their place" in run("plan", "prune").out


@pytest.mark.parametrize(
    "words",
    [
        ("--sparsity", 0.5, "--pattern", "2:4"),
        ("--sparsity", 0),
        ("--keep", 0.1),
        ("--keep", 0.75, "--sparsity", 0.5),
        ("--method", "width"),
        ("--method", "width", "--sparsity", 0.5),
        ("--method", "wanda", "--keep", 0.5),
        ("--no-repair",),
        ("--sparsity", 1),
        ("--pattern", "4:2"),
        ("--pattern", "3:7"),
        ("--method", "rtn"),
        ("--method", "wandda"),
        ("--ignore", "nothing"),
        ("--recipe", "awq-w4-g128"),
        ("--samples", 0),
        ("--device", "cuda"),
    ],
    ids=str,
)
def test_mistakes_are_named(words: tuple[object, ...], run: Callable, tmp_path: Path) -> None:
    run("prune", *words, "--no-eval").refused(2)
    assert not (tmp_path / "artifacts").exists()


def test_quantize_refuses_a_pruning_recipe_s_settings(run: Callable) -> None:
    run("quantize", "--recipe", "wanda-2of4", "--bits", 4).refused(2)
