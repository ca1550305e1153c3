"""`compress gate` as typed: what it writes, checks and refuses before any work. More in test_gate_controls.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.evaluation.records import write_record
from tests.evaluation.gate_records import model, record, task, text

POLICY = """
version = 1
name = "here"
[[gate]]
id = "kl"
kind = "kl_mean"
max = {limit}
"""


@pytest.fixture
def scored(tmp_path: Path) -> str:
    made = record(model=model("a-awq", 400, "w4a16-g128"), texts=[text(kl=0.016)], tasks=[task(700, 260, 20, 20)])
    write_record(made, tmp_path / "eval.json")
    (tmp_path / "policy.toml").write_text(POLICY.format(limit=0.02))
    return "eval.json"


def test_a_verdict_can_be_checked_later(run: Callable, scored: str, tmp_path: Path) -> None:
    words = ("gate", scored, "--policy", "policy.toml")
    written = run(*words, "--output", "v.json", "--junit", "v.xml", "--markdown", "v.md")
    assert written.code == 0
    assert all((tmp_path / name).stat().st_size for name in ("v.json", "v.xml", "v.md"))
    for check in (("gate", "--check", "v.json"), (*words, "--check", "v.json")):
        again = run(*check)
        assert (again.code, "follows from the records" in again.err) == (0, True)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "v.json").write_bytes((tmp_path / "v.json").read_bytes())
    assert "cannot be checked" in run("gate", "--check", "alone/v.json").refused(5)
    (tmp_path / "other.toml").write_text(POLICY.format(limit=0.03))
    for records in ((), (scored,)):
        run("gate", *records, "--check", "v.json", "--policy", "other.toml").refused(5)
    run("gate", "--check", "v.json", "--baseline", scored).refused(2)
    run("gate", "--check", scored).refused(5)
    run("gate", "--check", "missing.json").refused(2)
    (tmp_path / "cut.json").write_bytes((tmp_path / "v.json").read_bytes()[:-20])
    run("gate", "--check", "cut.json").refused(5)
    (tmp_path / "edited.json").write_text(
        (tmp_path / "v.json").read_text().replace('"FAIL"', '"PASS"').replace("here", "h")
    )
    run("gate", "--check", "edited.json").refused(5)


def test_a_check_repeats_the_exit_code(run: Callable, scored: str, tmp_path: Path) -> None:
    for limit, code in ((0.001, 1), (0.016, 3)):
        (tmp_path / "policy.toml").write_text(POLICY.format(limit=limit))
        assert run("gate", scored, "--policy", "policy.toml", "--output", "v.json").code == code
        assert run("gate", "--check", "v.json").code == code


@pytest.mark.parametrize(
    "words",
    [
        ("--sign", "key"),
        ("--output", "v.json", "--sign", "missing"),
        ("--allowed-signers", "file"),
        ("--plan", "--noise-floor"),
        ("--plan", "--output", "v.json"),
        ("--noise-floor", "--baseline", "x", "--junit", "v.xml"),
        ("--output", "nowhere/v.json"),
        ("--markdown", "."),
        ("--noise-floor",),
        (),
    ],
)
def test_what_does_not_fit_together_is_refused_first(run: Callable, tmp_path: Path, words: tuple[str, ...]) -> None:
    candidate = () if "--noise-floor" in words or not words else ("missing.json",)
    run("gate", *candidate, *words).refused(2)
    assert not list(tmp_path.glob("v.*"))


def test_a_missing_record_is_not_called_a_model(run: Callable) -> None:
    refused = run("gate", "missing.json")
    refused.refused(2)
    assert "eval.json" in refused.err


def test_the_document_names_what_it_rests_on(run: Callable, scored: str) -> None:
    found = run("gate", scored, "--policy", "policy.toml", "--json").json
    assert found["records"]["baseline"] == json.loads(Path(scored).read_text())["sha256"]
    assert len(found["candidate"]["digest"]) == len(found["policy_sha256"]) == len(found["code"]["sha256"]) == 64
