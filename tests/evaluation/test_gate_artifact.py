"""The gate on artifacts: their own scores are used where they fit, and nothing passes that was tampered with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import verify
from compress.artifact.attach import attach_eval
from compress.artifact.store import list_artifacts
from compress.errors import IntegrityError, UserError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.gate import gate
from compress.evaluation.policy import Policy
from compress.evaluation.records import EvalRecord
from compress.pipeline import run
from compress.recipe import Recipe
from tests.evaluation.gate_records import forbid_scoring

LOOSE: dict[str, Any] = {"version": 1, "gate": [{"id": "kl", "kind": "kl_mean", "max": 100.0}]}


@pytest.fixture
def bound(text: Path) -> Policy:
    """Loose limits that hold for the short text only."""
    return Policy.model_validate({**LOOSE, "data": str(text)})


@pytest.fixture
def scored(artifact: Path, tiny: Path, text: Path) -> Path:
    """The artifact with its scores against the tiny model."""
    attach_eval(artifact, evaluate(artifact, tiny, data=text, device="cpu").model_dump(mode="json"))
    return artifact


def test_the_scores_of_an_artifact_are_used(
    scored: Path, tiny: Path, bound: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify.require_sound(scored)
    forbid_scoring(monkeypatch)
    verdict = gate(scored, tiny, bound)
    assert verdict.verdict == "PASS"
    assert verdict.candidate.quantized
    assert verdict.candidate.name == "tiny-rtn/v1"
    assert gate(scored, policy=bound) == verdict
    with pytest.raises(AssertionError, match="scored again"):
        gate(scored, tiny, Policy.model_validate({**LOOSE, "data": "tales_heldout"}))


def test_scores_of_an_artifact_in_other_windows_do_not_serve(
    artifact: Path, tiny: Path, text: Path, bound: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach_eval(artifact, evaluate(artifact, tiny, data=text, seq_len=8, device="cpu").model_dump(mode="json"))
    forbid_scoring(monkeypatch)
    with pytest.raises(AssertionError, match="scored again"):
        gate(artifact, tiny, bound)
    assert gate(artifact, tiny, bound.model_copy(update={"seq_len": 8})).verdict == "PASS"


def test_the_scheme_of_an_artifact_is_that_of_its_recipe(scored: Path, tiny: Path, bound: Policy) -> None:
    verdict = gate(scored, tiny, bound)
    assert verdict.candidate.scheme == "w4a16-g32"
    assert verdict.baseline.scheme == "dense"
    tight = {**LOOSE, "profile": {"w4": {"schemes": ["w4a16*"], "kl": {"max": 1e-9}}}, "data": bound.data}
    strict = gate(scored, tiny, Policy.model_validate(tight))
    assert (strict.profile, strict.verdict) == ("w4", "FAIL")


def test_an_artifact_is_scored_where_its_scores_do_not_serve(
    scored: Path, tiny: Path, bound: Policy, rounded: Callable[..., Path]
) -> None:
    other = gate(scored, rounded(tiny, 8), bound, device="cpu")
    assert other.baseline.digest != gate(scored, tiny, bound).baseline.digest
    assert {g.id: g.estimate for g in other.gates} != {g.id: g.estimate for g in gate(scored, tiny, bound).gates}


def test_an_artifact_without_scores_needs_a_baseline(artifact: Path, tiny: Path, bound: Policy) -> None:
    with pytest.raises(UserError, match="was not scored"):
        gate(artifact, policy=bound)
    assert gate(artifact, tiny, bound, device="cpu").verdict == "PASS"


def test_scores_against_itself_say_nothing_of_an_artifact(
    artifact: Path, tiny: Path, text: Path, tmp_path: Path, bound: Policy
) -> None:
    itself = Path(shutil.copytree(artifact, tmp_path / "itself"))
    attach_eval(artifact, evaluate(artifact, itself, data=text, device="cpu").to_bytes())
    for candidate in (artifact, artifact / "eval.json"):
        with pytest.raises(IntegrityError, match="was scored against itself, which it was not made from") as refused:
            gate(candidate, policy=bound)
        assert "--baseline" in str(refused.value.hint)
    assert gate(artifact, itself, bound).verdict == "PASS"  # asked for by name: an A/A run
    kl = list_artifacts(artifact.parent)[0]
    assert (kl.scores["kl_mean"].value, kl.against) == (0.0, "itself")
    assert f"Scored against itself, not against the parent {tiny.name}" in (artifact / "README.md").read_text()
    attach_eval(artifact, evaluate(artifact, tiny, data=text, device="cpu").to_bytes())
    assert list_artifacts(artifact.parent)[0].against is None
    assert "Scored against" not in (artifact / "README.md").read_text()
    assert gate(artifact, policy=bound).baseline.name == tiny.name


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "recipe.yaml", "compress_manifest.json"])
def test_a_changed_artifact_is_refused(
    name: str, scored: Path, tiny: Path, text: Path, bound: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(scored / name, -100)
    for refused in (
        lambda: evaluate(scored, tiny, data=text, device="cpu"),
        lambda: evaluate(tiny, scored, data=text, device="cpu"),
        lambda: gate(scored, tiny, bound, device="cpu"),
    ):
        with pytest.raises(IntegrityError):
            refused()


def test_changed_scores_are_not_judged_and_can_be_made_again(
    scored: Path, tiny: Path, text: Path, bound: Policy
) -> None:
    flip(scored / "eval.json", -100)
    with pytest.raises(IntegrityError):
        gate(scored, tiny, bound, device="cpu")
    record = evaluate(scored, tiny, data=text, device="cpu")
    attach_eval(scored, record.model_dump(mode="json"))
    verify.require_sound(scored)


def test_scores_of_another_artifact_are_refused(
    scored: Path, tiny: Path, text: Path, tmp_path: Path, bound: Policy
) -> None:
    recipe = Recipe.model_validate(
        {"stages": [{"kind": "quantize", "method": "rtn", "scheme": {"bits": 8, "group_size": 32}}]}
    )
    other = run(recipe, model=tiny, output=tmp_path / "other").artifact.path
    taken = json.loads((scored / "eval.json").read_text())
    foreign = EvalRecord.model_validate_json(json.dumps(taken)).model_copy(update={"artifact_id": None}).sealed()
    attach_eval(other, foreign.model_dump(mode="json"))
    with pytest.raises(IntegrityError, match="belongs to another artifact"):
        gate(other, tiny, bound)
