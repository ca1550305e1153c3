"""Gates and evals among the stages of a run: what goes on, what ends, what is kept, and what a plan says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import compress
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.cli import main
from compress.commands.show import lineage_text
from compress.errors import UserError, WorkError
from compress.models.checkpoint import Checkpoint
from compress.recipe import Recipe, parse_recipe
from compress.workflows import staged_plan
from compress.workflows.quantize import quantize

CUT = {"kind": "prune", "method": "width", "keep": 0.8}
ROUND = {"kind": "quantize", "method": "rtn", "scheme": {"bits": 8, "group_size": "channel"}}


@pytest.fixture
def policy(tmp_path: Path, text: Path) -> Callable[[float], str]:
    """policy(least): a policy file that wants weight files so many times smaller."""

    def make(least: float) -> str:
        path = tmp_path / f"at-least-{least}.toml"
        path.write_text(
            f'version = 1\nname = "small"\ndata = "{text}"\nseq_len = 24\nmax_tokens = 2048\n'
            f'[[gate]]\nid = "size"\nkind = "size_ratio"\nmin = {least}\n'
        )
        return str(path)

    return make


@pytest.fixture
def line(text: Path) -> Callable[..., Recipe]:
    def make(*gates: dict[str, Any]) -> Recipe:
        first, last = gates
        cut = {**CUT, "calibration": {"source": str(text), "samples": 4, "seq_len": 24}}
        return parse_recipe({"stages": [cut, first, ROUND, last]})

    return make


def gate(policy: str) -> dict[str, Any]:
    return {"kind": "gate", "policy": policy}


def test_a_run_whose_gates_pass_is_as_without_them_and_carries_its_verdict(
    line: Callable[..., Recipe], policy: Callable[[float], str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, output = tiny("llama"), tmp_path / "out"
    recipe = line(gate(policy(1.0)), gate(policy(1.2)))
    done = quantize(recipe, model=model, output=output)
    assert [verdict.verdict for verdict in done.verdicts] == ["PASS", "PASS"]
    assert done.stopped is None
    assert done.evaluation is not None
    assert done.evaluation["baseline"]["name"] == model.name
    (attached,) = [name for name in done.artifact.manifest.attachments if name.startswith("verdict")]
    assert json.loads((output / attached).read_text())["sha256"] == done.verdicts[-1].sha256
    assert verify(output).ok
    bare = recipe.model_copy(update={"checks": []})
    assert bare.hash() == recipe.hash() == done.artifact.manifest.recipe_hash
    assert "gate" not in done.artifact.recipe_text
    again = quantize(bare, model=model, output=tmp_path / "bare", evaluate=False)
    assert again.artifact.artifact_id == done.artifact.artifact_id
    second = quantize(recipe, model=model, output=output)
    assert second.complete_already
    assert second.verdicts[-1].records == done.verdicts[-1].records
    parents = done.artifact.manifest.parents
    assert lineage_text(parents).startswith(f"{model.name} ({parents[0].digest[:12]}) --prune--> 1-width-")
    assert lineage_text(parents).endswith("--quantize--> this")


def test_a_gate_that_fails_ends_the_run_and_keeps_the_artifact_before_it(
    line: Callable[..., Recipe], policy: Callable[[float], str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = quantize(line(gate(policy(9.0)), gate(policy(1.0))), model=tiny("llama"), output=output)
    assert ([verdict.verdict for verdict in done.verdicts], done.stopped) == (["FAIL"], 1)
    assert not output.exists()
    assert done.artifact.path.parent == tmp_path / "out.stages"
    kept = Artifact.open(done.artifact.path)
    assert json.loads(kept.attachment("verdict.json") or b"")["verdict"] == "FAIL"
    assert verify(kept.path).ok
    went_on = quantize(line(gate(policy(1.0)), gate(policy(1.0))), model=tiny("llama"), output=output)
    assert went_on.stopped is None
    assert went_on.artifact.path == output


def test_an_eval_scores_what_stands_before_it_once(
    line: Callable[..., Recipe], text: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    suite = tmp_path / "own.toml"
    suite.write_text(f'version = 1\n[[text]]\nname = "{text}"\nseq_len = 24\nmax_tokens = 2048\n')
    wanted = {"kind": "eval", "suite": str(suite)}
    model, output = tiny("llama"), tmp_path / "out"
    done = quantize(line(wanted, wanted), model=model, output=output)
    first = next((tmp_path / "out.stages").iterdir())
    for path in (first, output):
        record = Artifact.open(path).eval()
        assert record is not None
        assert record["suite"]["name"] == "own"
        assert record["baseline"]["name"] == model.name
    stamp = (output / "eval.json").stat().st_mtime_ns
    assert quantize(line(wanted, wanted), model=model, output=output).complete_already
    assert (output / "eval.json").stat().st_mtime_ns == stamp
    assert done.stopped is None


def test_what_is_not_there_is_refused_before_any_work(
    line: Callable[..., Recipe], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    for check, words in ((gate("no-such"), "no-such"), ({"kind": "eval", "suite": "no-such"}, "no suite 'no-such'")):
        with pytest.raises(UserError, match=words):
            quantize(line(check, gate("default")), model=tiny("llama"), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_checks_in_a_recipe() -> None:
    recipe = parse_recipe({"stages": [CUT, gate("a"), ROUND, {"kind": "eval"}, gate("b")]})
    assert [(placed.check.kind, placed.after) for placed in recipe.checks] == [("gate", 1), ("eval", 2), ("gate", 2)]
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    for stages, words in (
        ([gate("a"), ROUND], "no stage before it"),
        ([CUT, {"kind": "gate", "polcy": "a"}, ROUND], "stages.1.polcy: unknown key, did you mean `policy`"),
        ([CUT, gate("a"), {**ROUND, "bitz": 1}], "stages.2.bitz: unknown key"),
        ([gate("a")], "at least one entry"),
    ):
        with pytest.raises(UserError, match=words):
            parse_recipe({"stages": stages})
    with pytest.raises(UserError, match="write `kind: gate`"):
        parse_recipe({"stages": [ROUND], "checks": []})


@pytest.mark.parametrize("method", ["width", "depth"])
def test_a_plan_tells_the_sizes_that_the_run_then_makes(
    method: str, text: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    calibration = {"source": str(text), "samples": 4, "seq_len": 24}
    cut = {"kind": "prune", "method": method, "keep": 0.8, "calibration": calibration}
    learn = {"kind": "distill", "lora_rank": 0, "steps": 1, "batch_size": 4}
    learn["calibration"] = {"source": str(text), "samples": 24, "seq_len": 24}
    recipe = parse_recipe({"stages": [cut, learn, ROUND, gate("default")]})
    model, output = tiny("llama", num_hidden_layers=4), tmp_path / "out"
    given: dict[str, Any] = {"model": model, "output": output, "device": "auto", "restart": False, "scored": False}
    plans = staged_plan.plan(recipe, **given)
    assert list(tmp_path.glob("out*")) == []
    makers = recipe.model_copy(update={"checks": []})
    quantize(makers, model=model, output=output, evaluate=False)
    made = [*sorted((tmp_path / "out.stages").iterdir()), output]
    for staged, path in zip(plans, made, strict=True):
        assert staged.plan is not None
        assert staged.plan.output == path
        more = Checkpoint.open(path).nbytes - staged.plan.output_bytes
        assert more == (0 if path != output else 16 * len(staged.plan.linears)), "plans leave weight_shape out"
    assert "what the gate default says" in plans[-1].unknown


def test_a_plan_finds_what_a_later_stage_cannot_do_and_says_what_it_cannot_tell(
    text: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    calibration = {"source": str(text), "samples": 4, "seq_len": 24}
    cut = {**CUT, "calibration": calibration}
    wrong = {"kind": "quantize", "method": "rtn", "scheme": {"bits": 4, "group_size": 7}}
    given: dict[str, Any] = {"model": tiny("llama"), "output": tmp_path / "out", "device": "auto"}
    given |= {"restart": False, "scored": False}
    *_, last = staged_plan.plan(parse_recipe({"stages": [cut, wrong]}), **given)
    assert last.plan is not None
    assert "group size 7 does not divide" in last.plan.problems[0]
    packed = {"kind": "prune", "method": "magnitude", "sparsity": 0.5, "format": "sparse-bitmask"}
    *_, last = staged_plan.plan(parse_recipe({"stages": [packed, ROUND]}), **given)
    assert last.plan is None


def test_every_way_to_run_a_recipe_obeys_its_gate(
    policy: Callable[[float], str], tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gated.yaml"
    path.write_text(yaml.safe_dump({"stages": [ROUND, gate(policy(9.0))]}))
    words = ["quantize", str(tiny("llama")), "--recipe", str(path), "--output", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 1
    assert "gate small: FAIL; the run ended behind stage 1 of 1 (quantize rtn)" in capsys.readouterr().err
    with pytest.raises(WorkError, match="gate small: FAIL behind stage 1"):
        compress.quantize(tiny("llama"), recipe=path, output=tmp_path / "out")
    assert Artifact.open(tmp_path / "out").attachment("verdict.json") is not None
    with pytest.raises(UserError, match="not held to a recipe's gates"):
        compress.quantize(tiny("llama"), recipe=path, target_bits=4.0, output=tmp_path / "mixed")
