"""What a draft is worth on held-out text, and generating with one from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from compress.artifact.verify import verify
from compress.cli import main
from compress.content import default_model
from compress.recipe import parse_recipe
from compress.runtime.loading import load
from compress.runtime.text_model import TextModel
from compress.workflows.drafts import open_draft, worth
from compress.workflows.quantize import quantize

PROMPT = "Once upon a time there was a king"


def test_the_worth_of_a_draft_that_is_the_model_itself() -> None:
    target = cast(TextModel, load(default_model()))
    found = worth(target, open_draft(default_model(), target), 3, prompts=[PROMPT, "The queen said"], new_tokens=12)
    assert found.equal
    assert found.acceptance == 1.0
    assert found.speculation.accepted_at[0] == found.speculation.steps
    assert found.tokens_per_step is not None
    assert 3.0 < found.tokens_per_step <= 4.0
    assert found.tokens_per_second is not None


def test_generate_with_a_draft_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--prompt", PROMPT, "--max-tokens", "12", "--json"]
    assert main(words) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*words, "--draft", str(default_model()), "--draft-tokens", "2"]) == 0
    shown = capsys.readouterr()
    drafted = json.loads(shown.out)
    assert drafted["text"] == plain["text"]
    assert plain["speculation"] is None
    assert drafted["speculation"]["accepted"] == drafted["speculation"]["proposed"] > 0
    assert "tokens per step of the model" in shown.err


def test_what_cannot_draft_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--prompt", PROMPT, "--draft"]
    for more, code, said in (
        ([str(tmp_path / "none")], 2, "none"),
        ([str(tiny("llama"))], 5, "different tokenizers"),
        ([str(default_model()), "--draft-tokens", "0"], 2, "0 draft tokens"),
    ):
        assert main([*words, *more]) == code
        assert said in capsys.readouterr().err


def test_a_draft_learns_from_the_compressed_model_that_it_drafts_for(
    text: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, artifact = tiny("llama"), tmp_path / "target"
    rounded = {"kind": "quantize", "method": "rtn", "scheme": {"bits": 4, "group_size": 32}}
    quantize(parse_recipe({"stages": [rounded]}), model=model, output=artifact, evaluate=False)
    cut = {"kind": "prune", "method": {"kind": "depth", "protect_first": 0, "protect_last": 0}, "keep": 0.7}
    cut["calibration"] = {"source": str(text), "samples": 4, "seq_len": 24}
    learn = {"kind": "distill", "lora_rank": 0, "steps": 2, "batch_size": 4, "teacher": str(artifact)}
    learn["calibration"] = {"source": str(text), "samples": 24, "seq_len": 24}
    done = quantize(parse_recipe({"stages": [cut, learn]}), model=model, output=tmp_path / "draft", evaluate=False)
    assert [parent.stage for parent in done.artifact.manifest.parents] == ["prune", "teach", "distill"]
    assert done.artifact.manifest.parents[1].name == "target"
    target = cast(TextModel, load(artifact))
    draft = open_draft(done.artifact.path, target)
    found = worth(target, draft, 3, prompts=["word one two", "three"], new_tokens=8)
    assert found.equal
    assert found.speculation.proposed > 0


def test_a_recipe_measures_its_draft_once_and_tells_of_it(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = tiny("llama"), tmp_path / "draft"
    little = {"kind": "prune", "method": "magnitude", "sparsity": 0.1}
    recipe = parse_recipe({"stages": [little, {"kind": "draft", "tokens": 2, "prompts": 2, "new_tokens": 6}]})
    artifact = quantize(recipe, model=model, output=output, evaluate=False).artifact
    found = artifact.draft()
    assert found is not None
    assert (found["target"], found["draft_tokens"], found["prompts"]) == (model.name, 2, 2)
    assert found["target_digest"] == artifact.manifest.parents[0].digest
    assert found["same_answers"]
    assert found["acceptance"] == found["accepted"] / found["proposed"]
    assert 0 < found["accepted"] == sum(found["accepted_at"]) <= found["proposed"]
    said = f"{100 * found['acceptance']:.1f}%"
    card = (output / "README.md").read_text()
    assert f"2 tokens at a time: {said} of\n{found['proposed']} proposed" in card
    written = (output / "draft.json").stat().st_mtime_ns
    assert quantize(recipe, model=model, output=output, evaluate=False).complete_already
    assert (output / "draft.json").stat().st_mtime_ns == written, "measured once"
    assert verify(output).ok
    assert main(["show", str(output)]) == 0
    assert "As a draft for" in capsys.readouterr().err
    assert main(["report", str(output)]) == 0
    assert f"of {found['proposed']} proposed tokens" in capsys.readouterr().out
