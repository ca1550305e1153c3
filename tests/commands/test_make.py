"""The commands that make artifacts, on the packaged model: what they write, say and leave alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import compress
import compress.cli
import compress.content
import compress.recipe
from compress.artifact import durable
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.commands import _progress
from compress.evaluation.samples import read_samples
from compress.evaluation.suites import load_suite

QUICK = ("--samples", 4, "--seq-len", 64)
pytestmark = pytest.mark.usefixtures("one_thread")


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_quantize_makes_a_scored_artifact_and_says_where(run: Callable, tmp_path: Path) -> None:
    result = run("quantize", "--method", "rtn", "--json")
    document = result.json
    artifact = Artifact.open(document["artifact"])
    assert result.code == 0
    assert artifact.path == tmp_path / "artifacts/tales-6m-rtn-w4a16-g128/v1"
    assert document["artifact_id"] == artifact.artifact_id
    assert document["sizes"]["bits_per_weight"] == 4.125
    assert (document["complete_already"], document["computed_blocks"]) == (False, 6)
    assert document["summary"]["kl_mean"]["estimate"] > 0
    assert [(task["name"], task["items"]) for task in document["tasks"]] == [("tales_cloze", 3)]
    assert document["not_scored"] is None
    record = artifact.eval()
    assert record is not None
    assert (record["artifact_id"], record["suite"]["name"]) == (artifact.artifact_id, "smoke")
    assert record["baseline"]["digest"] == artifact.manifest.parents[-1].digest
    assert record["generation"]["prompts"] == 1
    assert {item.item_id for item in read_samples(artifact.path / "samples.jsonl.gz")["tales_cloze"]} == set(
        record["tasks"][0]["item_ids"]
    )
    card = (artifact.path / "README.md").read_text()
    assert "| tales_cloze | 3 |" in card
    assert f"On {record['texts'][0]['data']['tokens']} tokens of `tales_heldout`" in card
    assert run("list", "--json").json["artifacts"][0]["scores"]["kl_mean"]["value"] > 0
    assert run("verify", artifact.path).code == 0


def test_smoke_itself_scores_what_was_made(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.evaluation.scope.SMOKE", "smoke")
    document = run("quantize", "--method", "rtn", "--json", "--eval-tokens", 2600).json
    record = Artifact.open(document["artifact"]).eval()
    assert record is not None
    suite = load_suite("smoke")
    assert [task["name"] for task in record["tasks"]] == [task.name for task in suite.tasks]
    assert [text.max_tokens for text in suite.texts] == [16384]
    assert record["texts"][0]["data"]["tokens"] <= 2600
    assert record["suite"]["sha256"] != suite.sha256(), "its hash says that the text was cut short"
    assert not list((tmp_path / "artifacts").rglob("*.tmp"))


def test_without_lm_eval_the_tasks_are_left_out_and_the_rest_is_scored(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.evaluation.evaluate.can_run_tasks", lambda: False)
    result = run("quantize", "--method", "rtn", "--json")
    assert "were left out: they run on lm-eval (pip install 'compress[eval]')" in result.err
    assert (result.json["tasks"], result.json["not_scored"]) == ([], None)
    assert result.json["summary"]["kl_mean"]["estimate"] > 0
    assert "lm-eval, which is not installed" in run("eval", "--tasks", "tales_cloze:5").refused(2)


def test_scores_of_an_older_schema_are_made_again(run: Callable, copy: Path) -> None:
    from compress.artifact.attach import attach_eval

    attach_eval(copy, {"schema_version": 1, "summary": {"kl_mean": {"estimate": 0.5}}})
    assert run("list", copy.parent, "--json").json["artifacts"][0]["scores"]["kl_mean"]["value"] == 0.5
    document = run("quantize", "--method", "rtn", "--output", copy, "--json").json
    assert document["complete_already"] is True
    assert document["summary"]["kl_mean"]["estimate"] != 0.5


def test_the_same_command_again_is_complete_and_changes_nothing(run: Callable, copy: Path) -> None:
    before = snapshot(copy)
    result = run("quantize", "--method", "rtn", "--output", copy)
    assert (result.code, result.out) == (0, "copy\n")
    assert "complete already" in result.err
    assert snapshot(copy) == before


def test_a_complete_artifact_without_scores_is_scored_by_the_same_command(run: Callable, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run("quantize", "--method", "rtn", "--output", output, "--no-eval", "--json")
    assert first.json["not_scored"] == "not asked for"
    assert Artifact.open(output).eval() is None
    second = run("quantize", "--method", "rtn", "--output", output, "--json")
    assert second.json["complete_already"] is True
    assert second.json["summary"] is not None
    assert second.json["artifact_id"] == first.json["artifact_id"]


class Killed(BaseException):
    """Stands for the end of the process at a durable step."""


def killed_at(label: str, patched: pytest.MonkeyPatch, *words: object) -> None:
    """Runs a command that dies at the first durable step of this name."""

    def step(reached: str) -> None:
        if reached == label:
            raise Killed

    with patched.context() as inner:
        inner.setattr(durable, "step", step)
        with pytest.raises(Killed):
            compress.cli.main([str(word) for word in words])


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("file", ["eval.json", "README.md", "compress_manifest.json"])
def test_a_run_killed_while_its_scores_are_attached_is_healed_by_the_same_command(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path, moment: str, file: str
) -> None:
    words = ("quantize", "--method", "rtn", "--output", tmp_path / "out")
    shutil.copytree(made, tmp_path / "scored")
    assert run(*words, "--no-eval").code == 0
    monkeypatch.setattr("compress.workflows.quantize.score", attach_only(tmp_path / "scored"))
    killed_at(f"{moment} rename to {file}", monkeypatch, *words)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    if (moment, file) != ("after", "compress_manifest.json"):
        assert not verify(tmp_path / "out").ok
    document = run(*words, "--json").json
    assert document["complete_already"] is True
    assert document["summary"]["kl_mean"]["estimate"] > 0
    assert verify(tmp_path / "out").problems == []


def attach_only(scored: Path) -> Callable:
    """The scoring step without its work: it attaches the record of an artifact that was scored."""
    from compress.artifact.attach import attach_eval

    record = Artifact.open(scored).eval()
    assert record is not None
    return lambda artifact, *_, **__: attach_eval(artifact.path, record)


def test_new_scores_killed_halfway_are_made_again(run: Callable, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "eval.json").write_text('{"summary": null}')
    (copy / ".README.md.tmp").write_text("half")
    document = run("quantize", "--method", "rtn", "--output", copy, "--json").json
    assert document["summary"]["kl_mean"]["estimate"] > 0
    assert verify(copy).problems == []


def test_without_an_output_a_version_killed_before_its_scores_is_only_scored(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tmp_path / "artifacts/tales-6m-rtn-w4a16-g128"
    words = ("quantize", "--method", "rtn")
    killed_at("before write .eval.json.tmp", monkeypatch, *words)
    assert Artifact.open(family / "v1").eval() is None
    again = run(*words, "--json").json
    assert (again["artifact"], again["complete_already"]) == (str(family / "v1"), True)
    assert again["summary"] is not None
    assert run(*words, "--no-eval", "--json").json["artifact"] == str(family / "v2"), "finished and scored: a new one"


def test_without_an_output_a_version_killed_before_latest_is_taken_up(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tmp_path / "artifacts/tales-6m-rtn-w4a16-g128"
    words = ("quantize", "--method", "rtn", "--no-eval")
    killed_at("before link latest", monkeypatch, *words)
    assert not (family / "latest").exists()
    again = run(*words, "--json").json
    assert (again["artifact"], again["complete_already"]) == (str(family / "v1"), True)
    assert os.readlink(family / "latest") == "v1"


def test_what_cannot_be_scored_here_is_made_and_says_so(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.workflows.quantize.available_memory", lambda device: 1000)
    result = run("quantize", "--method", "rtn", "--output", tmp_path / "out")
    assert result.code == 0
    assert "not scored: it needs about 1.0 GB of memory, 0.0 GB are free" in result.err
    assert run("quantize", "--method", "rtn", "--output", tmp_path / "out", "--json").json["not_scored"]


def test_too_few_held_out_tokens_are_refused_before_anything_is_made(run: Callable, tmp_path: Path) -> None:
    for words in (("--method", "rtn"), ("--target-bits", 4)):
        result = run("quantize", *words, "--eval-tokens", 2554, "--output", tmp_path / "out")
        assert "2554 held-out tokens are too few windows of 512" in result.refused(2)
        assert "--eval-tokens of at least 2555" in result.err
        assert "measuring" not in result.err
    assert list(tmp_path.iterdir()) == []


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


def test_a_plan_says_what_does_not_fit_in_memory(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "memory free here" not in run("plan", "quantize", "--method", "rtn").err
    monkeypatch.setattr("compress.workflows.memory.available_memory", lambda device: 1000)
    planned = run("plan", "quantize", "--method", "rtn")
    assert planned.code == 0
    assert "warning: that peak is more than the 1 kB of memory free here: fewer --samples" in planned.err


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


def test_the_recipe_of_an_artifact_names_its_source_and_text(
    run: Callable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model / "config.json"
    config.write_text(config.read_text().replace("{", '{"mark": 1,', 1))
    text = (compress.content.calibration_dir() / "tales.txt").read_text(encoding="utf-8")[:60_000]
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.txt").write_text(text, encoding="utf-8")
    first = compress.quantize(
        "model", "gptq", 4, calib="one/mine.txt", samples=4, seq_len=64, output="a", evaluate=False
    )
    kept = compress.recipe.load_recipe("a/recipe.yaml")
    assert kept.model == str(model.resolve())
    assert kept.stages[0].calibration.source == str((tmp_path / "one/mine.txt").resolve())  # type: ignore[union-attr]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = run("run", "../a/recipe.yaml", "--output", "b", "--no-eval", "--json").json
    assert again["artifact_id"] == first.artifact_id
    assert again["parent"]["digest"] == first.manifest.parents[0].digest
    moved = ("--set", "stages.0.calibration.source=../two/mine.txt")
    other = run("run", "../a/recipe.yaml", *moved, "--output", "c", "--no-eval", "--json").json
    assert (other["artifact_id"], other["recipe_hash"]) == (first.artifact_id, first.manifest.recipe_hash)


def test_the_recipe_of_an_artifact_of_the_packaged_model_names_no_path(made: Path) -> None:
    text = (made / "recipe.yaml").read_text()
    assert "model:" not in text
    assert str(compress.default_model()) not in text


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
