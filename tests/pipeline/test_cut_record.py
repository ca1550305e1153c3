"""What a cut lost before and after repair: measured, kept, and carried on by what is made of the artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress import pipeline
from compress.artifact.cut import stages
from compress.evaluation.reports import markdown
from compress.evaluation.reports.artifact_document import artifact_document
from compress.pipeline.resolve import resolve
from compress.recipe import Recipe, parse_recipe
from compress.recipe_distill import DistillSettings, build_distill_recipe


def recipe(text: Path, **method: Any) -> Recipe:
    """A width cut calibrated on windows of 24 tokens."""
    calibration = {"source": str(text), "samples": 8, "seq_len": 24}
    stage = {"kind": "prune", "method": {"kind": "width", **method}, "keep": 0.7, "calibration": calibration}
    return parse_recipe({"stages": [stage]})


def log_distribution(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes, (tokens, vocabulary) float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.log_softmax(model(tokens, use_cache=False).logits.flatten(0, 1), -1)


def divergence(source: Path, path: Path, tokens: torch.Tensor) -> float:
    p, q = log_distribution(source, tokens), log_distribution(path, tokens)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("family", "hidden"), [("llama", 1.0), ("gemma3_text", 0.75), ("gpt2", 1.0)])
def test_both_kls_are_those_of_the_models_that_transformers_loads(
    family: str, hidden: float, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pipeline.inputs.CHUNK_TOKENS", 96)  # the first of two chunks is measured on
    source = tiny(family)
    made = pipeline.run(recipe(text, hidden=hidden), model=source, output=tmp_path / "repaired").artifact
    plain = pipeline.run(recipe(text, hidden=hidden, repair=False), model=source, output=tmp_path / "plain").artifact
    job = resolve(recipe(text), model=source, output=None, device="auto")
    assert job.calibration is not None
    tokens, found = job.calibration.tokens[:4], made.cut()
    assert found is not None
    assert plain.cut() is None, "nothing was repaired"
    assert (found["tokens"], found["method"]) == (96, "width")
    assert found["plain_kl"] == pytest.approx(divergence(source, plain.path, tokens), rel=1e-2)
    assert found["repaired_kl"] == pytest.approx(divergence(source, made.path, tokens), rel=1e-2)
    assert found["repaired_kl"] < found["plain_kl"]


def test_what_is_trained_from_a_cut_tells_all_of_it(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = tiny("llama")
    cut = pipeline.run(recipe(text), model=source, output=tmp_path / "cut").artifact
    assert [done for done, _, _ in stages(cut.cut())] == ["after the cut", "after repair"]
    settings = DistillSettings(teacher=str(source), data=str(text), seq_len=24, samples=44, steps=4, batch_size=4)
    trained = pipeline.run(build_distill_recipe(settings), model=cut.path, output=tmp_path / "trained").artifact
    before, after = cut.cut(), trained.cut()
    assert before is not None
    assert after is not None
    assert {**after, "taught": None} == before
    training = trained.training()
    assert training is not None
    lost = stages(trained.cut())
    assert [done for done, _, _ in lost] == ["after the cut", "after repair", "before training", "after training"]
    assert [kl for _, kl, _ in lost][2:] == [training["held_out"][0]["kl"], training["written_kl"]]
    for page in (
        (trained.path / "README.md").read_text(),
        "\n".join(markdown.document(artifact_document(trained, None)).splitlines()),
    ):
        assert all(f"| {done} | {kl:.4g} |" in page.replace("\\", "") for done, kl, _ in lost), page


def test_a_further_pruning_does_not_pass_it_on(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    cut = pipeline.run(recipe(text), model=tiny("llama"), output=tmp_path / "cut").artifact
    zeros = parse_recipe({"stages": [{"kind": "prune", "method": "magnitude", "sparsity": 0.5}]})
    assert cut.cut() is not None
    assert pipeline.run(zeros, model=cut.path, output=tmp_path / "sparse").artifact.cut() is None
