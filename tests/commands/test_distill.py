"""`compress distill` on the packaged model: what it makes, says, plans and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import compress
from compress.artifact.reader import Artifact
from compress.cli import main

QUICK = ("--steps", 2, "--seq-len", 32, "--samples", 26)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model with a third of its weights gone."""
    path = tmp_path_factory.mktemp("student") / "sparse"
    words = ["prune", "--method", "magnitude", "--sparsity", "0.3", "--no-eval", "--quiet", "--output", str(path)]
    assert main(words) == 0
    return path


def test_distill_makes_an_artifact_scored_against_the_teacher(run: Callable, student: Path, tmp_path: Path) -> None:
    result = run("distill", "--student", student, *QUICK, "--json")
    assert result.code == 0, result.err
    document = result.json
    artifact = Artifact.open(document["artifact"])
    assert artifact.path == tmp_path / "artifacts/sparse-forward-kl-lora16/v1"
    assert (document["method"], document["scheme"]) == ("forward-kl", "lora16")
    assert document["training"]["written_kl"] < document["training"]["held_out"][0]["kl"]
    assert [parent.stage for parent in artifact.manifest.parents] == ["prune", "teach", "distill"]
    scores = artifact.eval()
    assert scores is not None
    assert scores["baseline"]["digest"] == artifact.manifest.parents[1].digest
    assert document["summary"]["kl_mean"]["estimate"] > 0
    card = (artifact.path / "README.md").read_text()
    assert "held-out KL" in card
    assert "Scored against" not in card, "the teacher is what a student is measured against"
    assert run("verify", artifact.path).code == 0
    shown = run("show", artifact.path)
    assert "TRAINING" in shown.err.upper()
    assert "42 trained, 0 left as they were" in shown.out
    report = run("report", artifact.path, "--html", tmp_path / "page.html")
    assert report.code == 0
    assert "How it learned" in (tmp_path / "page.html").read_text()
    assert run("list", "--json").json["artifacts"][0]["scheme"] == "lora16"


def test_a_plan_writes_nothing(run: Callable, student: Path, tmp_path: Path) -> None:
    plan = run("plan", "distill", "--student", student, "--json").json
    assert (plan["minutes"], plan["steps"], plan["weights"]) == (8.0, None, "lora16")
    shown = run("distill", "--student", student, "--full", *QUICK, "--dry-run")
    assert shown.code == 0
    assert "full" in shown.out
    assert list(tmp_path.iterdir()) == []


def test_mistakes_have_their_exit_codes(run: Callable, student: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    other = Path(shutil.copytree(compress.default_model(), tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    quick = (*QUICK, "--output", "out")
    assert "no-such" in run("distill", "--student", student, "--teacher", "./no-such", *quick).refused(2)
    assert "no-such" in run("distill", "--student", "./no-such", *quick).refused(2)
    assert "empty" in run("distill", "--student", student, "--data", "empty.txt", *quick).refused(2)
    assert "different tokenizers" in run("distill", "--student", student, "--teacher", other, *quick).refused(5)
    assert "same model" in run("distill", "--student", compress.default_model(), *quick).refused(2)
    assert "both given" in run("distill", "--student", student, "--full", "--lora-rank", 4, *quick).refused(2)
    assert "hinge" in run("distill", "--student", student, "--loss", "hinge", *quick).refused(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "other"]


def test_it_is_in_the_python_interface(student: Path, tmp_path: Path) -> None:
    artifact = compress.distill(
        student, loss="jsd", steps=1, seq_len=32, samples=26, output=tmp_path / "out", evaluate=False
    )
    assert artifact.method == "jsd"
    assert artifact.eval() is None
