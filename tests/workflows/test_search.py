"""A search: every candidate made and taught alike, ranked at equal size, gated; and what follows the winner."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.artifact.manifest import MANIFEST_NAME
from compress.artifact.reader import Artifact
from compress.cli import main
from compress.errors import UserError
from compress.recipe import load_recipe
from compress.recipe_search import Search, load_search
from compress.workflows import search as work


@pytest.fixture
def recipe(text: Path, tmp_path: Path) -> Callable[..., Path]:
    """recipe(**search): a file with three candidates, a cut by magnitude of nothing to speak of among them."""

    def make(**more: Any) -> Path:
        calibration = {"source": str(text), "samples": 4, "seq_len": 24}

        def width(keep: float, **method: Any) -> list[dict[str, Any]]:
            return [{"kind": "prune", "method": {"kind": "width", **method}, "keep": keep, "calibration": calibration}]

        learn = {"kind": "distill", "lora_rank": 0, "steps": 2, "batch_size": 4}
        learn["calibration"] = {"source": str(text), "samples": 24, "seq_len": 24}
        first = {
            "kind": "search",
            "candidates": {
                "repaired": width(0.8),
                "bare": width(0.8, repair=False),
                "whole": [{"kind": "prune", "method": "magnitude", "sparsity": 0.02}],
            },
            "recover": [learn],
            "data": str(text),
            "tokens": 2200,
            **more,
        }
        rounded = {"kind": "quantize", "method": "rtn", "scheme": {"bits": 8, "group_size": "channel"}}
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump({"stages": [first, rounded]}))
        return path

    return make


def loaded(path: Path) -> Search:
    search = load_search(path)
    assert search is not None
    return search


def test_the_last_candidate_s_problem_is_told_before_the_first_is_made(
    recipe: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    search = loaded(recipe())
    candidates = search.candidates
    (cut, *others) = candidates["bare"].stages
    hopeless = candidates["bare"].model_copy(update={"stages": [cut.model_copy(update={"keep": 0.01}), *others]})
    search = replace(search, candidates={**candidates, "hopeless": hopeless})
    with pytest.raises(UserError, match=r"candidate hopeless, stage 1 .*would leave no neuron"):
        work.find(search, model=tiny("llama"), output=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_best_of_the_small_ones_wins_and_its_recipe_tells_of_all(
    recipe: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    search, model, output = loaded(recipe()), tiny("llama"), tmp_path / "out"
    found = work.find(search, model=model, output=output)
    assert [row.competes for row in found.rows] == [True, True, False]
    assert found.rows[2].name == "whole", "the least KL, but not as small"
    assert found.rows[0].kl.value < found.rows[1].kl.value
    assert found.rows[2].kl.value < found.rows[0].kl.value
    assert found.winner == found.rows[0].name
    assert all(row.before is not None and row.after is not None for row in found.rows)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.search/*/*/*")}
    assert work.find(search, model=model, output=output) == found
    done = work.run(search, found, model=model, output=output, evaluate=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.search/*/*/*")} == made, "nothing made twice"
    assert done.artifact.path == output
    assert [parent.stage for parent in done.artifact.manifest.parents] == ["prune", "teach", "distill", "quantize"]
    table = json.loads(done.artifact.attachment(work.RESULT) or b"")
    assert (table["winner"], len(table["candidates"])) == (found.winner, 3)
    resolved = load_recipe(output / "recipe.yaml")
    assert resolved.hash() == search.won(found.winner).hash()


KILLED = """
import sys
from compress.recipe_search import load_search
from compress.workflows import search
search.find(load_search(sys.argv[1]), model=sys.argv[2], output=sys.argv[3])
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_candidate_it_goes_on_there(
    recipe: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path, model, output = recipe(), tiny("llama"), tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(model), str(output)])
    try:  # the second candidate was cut, and is learning or about to
        while child.poll() is None and not list(tmp_path.glob(f"out.search/bare-*/1-*/{MANIFEST_NAME}")):
            time.sleep(0.02)
    finally:
        child.kill()
        assert child.wait() == -9, "it was to be killed while it worked"
    assert not list(tmp_path.glob(f"out.search/whole-*/*/{MANIFEST_NAME}")), "the third was not made yet"
    first = {file: file.stat().st_mtime_ns for file in tmp_path.glob("out.search/repaired-*/*/*")}
    cut = {file: file.stat().st_mtime_ns for file in tmp_path.glob("out.search/bare-*/1-*/*")}
    found = work.find(loaded(path), model=model, output=output)
    assert {file: file.stat().st_mtime_ns for file in first | cut} == first | cut, "nothing made twice"
    whole = work.find(loaded(path), model=model, output=tmp_path / "whole")
    assert found.winner == whole.winner
    made = [(row.name, row.kl, Artifact.open(row.artifact).artifact_id) for row in found.rows]
    assert made == [(row.name, row.kl, Artifact.open(row.artifact).artifact_id) for row in whole.rows]


def test_a_gate_that_no_candidate_passes_ends_the_run(
    recipe: Callable[..., Path],
    text: Path,
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = tmp_path / "strict.toml"
    policy.write_text(
        f'version = 1\nname = "strict"\ndata = "{text}"\nmax_tokens = 2200\n'
        '[[gate]]\nid = "size"\nkind = "size_ratio"\nmin = 99.0\n'
    )
    path = recipe(policy=str(policy), recover=[])
    words = ["run", str(path), "--model", str(tiny("llama")), "--output", str(tmp_path / "out"), "--json"]
    assert main(words) == 1
    shown = json.loads(capsys.readouterr().out)["search"]
    assert shown["winner"] is None
    assert [row["verdict"] for row in shown["candidates"]] == ["FAIL", "FAIL", None]
    assert not (tmp_path / "out").exists()
    wrong = ["--set", "stages.1.scheme.group_size=7"]
    assert main(["plan", *words, *wrong]) == 2
    assert "group size 7 does not divide" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    assert main([*words[:-2], str(tmp_path / "full"), "--json"]) == 2
    assert "already holds something else" in capsys.readouterr().err
    assert main(["plan", *words]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert set(planned["candidates"]) == {"repaired", "bare", "whole"}


def test_what_is_no_search_is_refused(recipe: Callable[..., Path], tmp_path: Path) -> None:
    data = yaml.safe_load(recipe().read_text())
    first, last = data["stages"]
    cut = first["candidates"]["bare"]

    def refused(stages: list[Any], words: str) -> None:
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump({"stages": stages}))
        with pytest.raises(UserError, match=words):
            load_search(path)

    refused([first], "nothing follows the search")
    refused([last, first], "a search is the first stage")
    refused([{**first, "tokenz": 1}, last], "stages.0.tokenz: unknown key")
    refused([{**first, "candidates": {"one": cut}}, last], "candidates")
    refused([{**first, "candidates": {"a": cut, "b": [last]}, "recover": []}, last], "candidate b quantises")
    refused([{**first, "candidates": {"a": cut, "../b": cut}}, last], "names a directory")
    refused([{**first, "candidates": {"a": cut, "b": [{"kind": "gate"}]}, "recover": cut}, last], "puts? a stage first")
    refused([{**first, "candidates": {"a": cut, "b": [*cut, {"kind": "gate"}]}}, last], "a gate or an eval of its own")
    assert load_search("awq-w4-g128") is None


def test_the_shipped_search() -> None:
    search = load_search("search-quantize", model="m", seed=5)
    assert search is not None
    won = search.won("blocks")
    assert [stage.kind for stage in won.stages] == ["prune", "distill", "quantize"]
    assert (won.model, won.seed) == ("m", 5)
