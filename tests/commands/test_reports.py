"""compare, trend and report: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compress.evaluation.records import EvalRecord, write_record
from compress.evaluation.verdict import write_verdict
from tests.evaluation.gate_records import model, record, task, text
from tests.evaluation.reports.made import accuracy, gate, mixed, verdict


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three eval files: a reference, one with half of its KL, and one scored on other tokens."""
    names = []
    for name, kl, right in (("awq", 0.016, 700), ("best", 0.008, 720), ("far", 0.03, 650)):
        scored = text(kl=kl)
        if name == "far":
            scored = scored.model_copy(update={"data": scored.data.model_copy(update={"windows_sha256": "9" * 64})})
        made = record(
            model=model(f"{'abf'[len(names)]}-{name}", 400 + 10 * len(names), "w4a16-g128"),
            texts=[scored],
            tasks=[task(right, 1000 - right - 40, 20, 20)],
        )
        write_record(made, tmp_path / f"{name}.json")
        names.append(f"{name}.json")
    return names


@pytest.fixture
def judged(tmp_path: Path) -> str:
    write_verdict(mixed(), tmp_path / "verdict.json")
    return "verdict.json"


def test_compare_prints_models_and_pairs(run: Callable, files: list[str]) -> None:
    done = run("compare", *files)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["a-awq", "b-best", "f-far"]
    assert next(line for line in lines if line.startswith("KL, nats")).split("  ")[0] == "KL, nats"
    ratio = next(line for line in lines if "KL ratio" in line)
    assert ratio.split()[-1] == "better"
    assert "not compared: f-far: perplexity and KL: other tokens under the name text" in lines


def test_compare_gives_one_json_document(run: Callable, files: list[str]) -> None:
    found = run("compare", *files, "--json").json
    assert [each["name"] for each in found["models"]] == ["a-awq", "b-best", "f-far"]
    assert found["models"][1]["summary"]["kl_mean"]["estimate"] == pytest.approx(0.008)
    pair = next(each for each in found["paired"] if each["what"] == "KL ratio")
    assert pair["estimate"] == pytest.approx(0.5)
    assert pair["low"] < 0.5 < pair["high"]
    assert {each["what"] for each in found["unpaired"]} == {"perplexity and KL"}


def test_compare_writes_a_page_and_a_picture(run: Callable, files: list[str], tmp_path: Path) -> None:
    done = run("compare", *files, "--html", "c.html", "--svg", "f.svg", "--quiet")
    assert done.code == 0
    assert (tmp_path / "c.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    ElementTree.fromstring((tmp_path / "f.svg").read_bytes())
    before = (tmp_path / "c.html").read_bytes()
    run("compare", *files, "--html", "c.html", "--quiet")
    assert (tmp_path / "c.html").read_bytes() == before


def test_compare_takes_artifacts(run: Callable, made: Path, copy: Path) -> None:
    found = run("compare", made, copy, "--json").json
    assert found["models"][0]["artifact_id"] == found["models"][1]["artifact_id"] is not None
    ratio = next(each for each in found["paired"] if each["what"] == "KL ratio")
    assert (ratio["estimate"], ratio["low"], ratio["high"]) == (1.0, 1.0, 1.0)


def test_compare_refuses(run: Callable, files: list[str], tmp_path: Path, model: Path, copy: Path) -> None:
    assert "cannot be compared" in run("compare", files[0]).refused(2)
    assert "missing.json is not an artifact: there is nothing there" in run(
        "compare", files[0], "missing.json"
    ).refused(2)
    assert "is a model, not an artifact" in run("compare", files[0], model).refused(2)
    assert "no record was scored on 'wikitext'" in run("compare", *files, "--text", "wikitext").refused(2)
    assert "--html nowhere/c.html" in run("compare", *files, "--html", "nowhere/c.html").refused(2)
    content = (tmp_path / files[0]).read_text(encoding="utf-8")
    (tmp_path / "cut.json").write_text(content[: len(content) // 2], encoding="utf-8")
    assert "is not a whole eval record" in run("compare", files[0], "cut.json").refused(5)
    (tmp_path / "edited.json").write_text(content.replace("a-awq", "a-new"), encoding="utf-8")
    assert "was edited" in run("compare", files[0], "edited.json").refused(5)
    data = bytearray((copy / "eval.json").read_bytes())
    data[-100] ^= 1
    (copy / "eval.json").write_bytes(data)
    assert "is not what the manifest says" in run("compare", copy, copy).refused(5)


def test_no_picture_without_a_kl(run: Callable, tmp_path: Path) -> None:
    alone: EvalRecord = record(baseline=None, texts=[text(alone=True)])
    write_record(alone, tmp_path / "a.json")
    assert "no picture" in run("compare", "a.json", "a.json", "--svg", "f.svg").refused(2)
    assert not (tmp_path / "f.svg").exists()


def fill(tmp_path: Path, run: Callable, runs: int, drop: float) -> None:
    """A history of that many runs, each against the one before."""
    for i in range(1, runs + 1):
        base = verdict(accuracy("lambada", -drop, baseline="last"))
        digests = [f"{number:064x}" for number in (i, i - 1)]
        candidate = base.candidate.model_copy(update={"digest": digests[0]})
        before = base.baselines["last"].model_copy(update={"digest": digests[1]})
        named = base.model_copy(update={"candidate": candidate, "baselines": {"last": before}}).sealed()
        write_verdict(named, tmp_path / "v.json")
        words = ("trend", "quality", "--add", "v.json", "--commit", f"commit{i}", "--release", f"v{i}")
        assert run(*words, "--quiet").code == 0


def test_ten_passes_that_lose_three_points_are_flagged(run: Callable, tmp_path: Path) -> None:
    fill(tmp_path, run, 10, 0.3)
    done = run("trend", "quality", "--html", "t.html", "--svg", "t.svg")
    assert done.code == 0
    warning = "warning: lambada: 10 steps since v1 add up to 3 points, more than the limit of one (-1 points)"
    assert warning in done.err
    assert "flagged" in (tmp_path / "t.html").read_text(encoding="utf-8")
    ElementTree.fromstring((tmp_path / "t.svg").read_bytes())
    found = run("trend", "quality", "--json", "--fail-on-drift")
    assert found.code == 1
    assert found.json["gates"][0]["steps_together"] == pytest.approx(-3.0)
    assert len(found.json["runs"]) == 10


def test_a_steady_history_is_fine(run: Callable, tmp_path: Path) -> None:
    fill(tmp_path, run, 4, 0.0)
    done = run("trend", "quality", "--fail-on-drift")
    assert (done.code, "warning" in done.err) == (0, False)


def test_a_run_is_added_once(run: Callable, judged: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("trend", "quality", "--add", judged, "--commit", "abc").code == 0
    assert (tmp_path / "quality" / "history.jsonl").read_text().count("\n") == 1


def test_the_commit_comes_from_ci(run: Callable, judged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI_COMMIT_SHA", "from-gitlab")
    assert run("trend", "quality", "--add", judged, "--json").json["runs"][0]["commit"] == "from-gitlab"


def test_trend_refuses(run: Callable, judged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_SHA", "CI_COMMIT_SHA"):
        monkeypatch.delenv(name, raising=False)
    assert "there is no history.jsonl" in run("trend", "quality").refused(2)
    assert "none is given" in run("trend", "quality", "--add", judged).refused(2)
    assert "no verdict is added" in run("trend", "quality", "--release", "v1").refused(2)
    edited = (tmp_path / judged).read_text().replace('"verdict": "FAIL"', '"verdict": "PASS"', 1)
    (tmp_path / "edited.json").write_text(edited)
    assert "was edited" in run("trend", "quality", "--add", "edited.json", "--commit", "x").refused(5)
    assert not (tmp_path / "quality").exists()


def test_report_of_an_artifact(run: Callable, made: Path, tmp_path: Path) -> None:
    done = run("report", made)
    assert done.code == 0
    for part in ("#### What it is", "#### Scores", "mean KL, nats per token", "#### Where the error went"):
        assert part in done.out
    run("report", made, "--html", "r.html", "--markdown", "r.md", "--quiet")
    assert (tmp_path / "r.md").read_text(encoding="utf-8") == done.out
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert run("report", made, "--json").json["title"]


def test_report_of_an_artifact_with_its_verdict(run: Callable, made: Path, judged: str) -> None:
    run("gate", made, "--output", "own.json", "--quiet")
    own = json.loads(Path("own.json").read_text())["verdict"]
    done = run("report", made, "--verdict", "own.json")
    assert f"**{own}**" in done.out.splitlines()[0]
    assert "#### Gates" in done.out
    assert "the verdict is about candidate" in run("report", made, "--verdict", judged).refused(5)


def test_report_of_several_compares_them(run: Callable, made: Path, copy: Path) -> None:
    done = run("report", made, copy)
    assert done.out.startswith("### 2 reports\n")
    assert "#### In pairs" in done.out


def test_report_of_a_verdict_in_every_form(run: Callable, judged: str, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    done = run("report", judged)
    assert done.out.startswith("<!-- compress-eval -->\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    done = run("report", judged, "--html", "v.html", "--junit", "v.xml", "--markdown", "v.md", "--github")
    assert done.code == 0
    assert "::error title=gate kl::" in done.err
    assert ElementTree.fromstring((tmp_path / "v.xml").read_bytes()).attrib["failures"] == "1"
    assert "verdict=FAIL" in (tmp_path / "output").read_text()


def test_report_refuses(run: Callable, files: list[str], judged: str, made: Path, tmp_path: Path, copy: Path) -> None:
    assert "nothing to report on" in run("report").refused(2)
    assert "neither an artifact nor a verdict" in run("report", files[0]).refused(2)
    assert "need a verdict" in run("report", made, "--junit", "x.xml").refused(2)
    assert "exactly one artifact" in run("report", made, made, "--verdict", judged).refused(2)
    assert "there is nothing there" in run("report", "missing").refused(2)
    (tmp_path / "cut.json").write_bytes((tmp_path / judged).read_bytes()[:200])
    assert "is not whole JSON" in run("report", "cut.json").refused(5)
    (copy / "layers.json").write_text("[]")
    assert "is not what the manifest says" in run("report", copy).refused(5)


def test_a_passing_verdict_reports_no_reason(run: Callable, tmp_path: Path) -> None:
    write_verdict(verdict(gate()), tmp_path / "pass.json")
    out = run("report", "pass.json").out
    assert "✅ **PASS**" in out
    assert "#### Why" not in out
