"""GitHub step files and annotations: escaped as the runner reads them, at most ten of a level, nothing elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress.errors import WorkError
from compress.evaluation.reports import github, markdown
from compress.evaluation.reports.verbatim import workflow_data, workflow_property
from tests.evaluation.reports.made import NASTY, gate, mixed, verdict


def undo(text: str, *, prop: bool) -> str:
    """What the runner makes of an escaped text."""
    pairs = [("%0D", "\r"), ("%0A", "\n")] + ([("%3A", ":"), ("%2C", ",")] if prop else [])
    for coded, plain in pairs:
        text = text.replace(coded, plain)
    return text.replace("%25", "%")


def parse(line: str) -> tuple[str, dict[str, str], str]:
    """A workflow command as the runner's own rules read it: `::name key=value,key=value::message`."""
    match = re.fullmatch(r"::(\w+)(?: ([^:]*))?::(.*)", line)
    assert match, line
    name, given, message = match.groups()
    properties = dict(pair.split("=", 1) for pair in given.split(",")) if given else {}
    return name, {key: undo(value, prop=True) for key, value in properties.items()}, undo(message, prop=False)


def test_what_blocks_is_an_error_and_the_rest_a_warning() -> None:
    lines = [parse(line) for line in github.annotation_lines(mixed())]
    assert [(level, given["title"]) for level, given, _ in lines] == [
        ("notice", "compress gate"),
        ("error", "gate kl"),
        ("error", "gate lambada"),
        ("warning", "gate tail"),
        ("warning", "gate decode"),
        ("warning", "gate memory"),
    ]
    assert lines[0][2] == "FAIL: of 8 gates 2 block and 3 more did not pass; shown: 2 and 3"
    assert lines[1][2] == "FAIL: 0.031 [0.028, 0.034] nats, limit ≤ 0.02 nats: kl says FAIL"


def test_only_the_first_ten_of_each_level() -> None:
    gates = [gate(f"g{i}", "FAIL") for i in range(25)] + [gate(f"s{i}", "FAIL", role="secondary") for i in range(14)]
    lines = [parse(line) for line in github.annotation_lines(verdict(*gates))]
    levels = [level for level, _, _ in lines]
    assert (levels.count("notice"), levels.count("error"), levels.count("warning")) == (1, 10, 10)
    assert lines[0][2].endswith("of 39 gates 25 block and 14 more did not pass; shown: 10 and 10")


def test_a_pass_says_so() -> None:
    assert github.annotation_lines(verdict(gate())) == ["::notice title=compress gate::PASS: all 1 gates"]


def test_names_from_outside_are_escaped() -> None:
    nasty = "100% of a:b,c\r\n::error::forged"
    line = github.annotation_lines(verdict(gate("kl", "FAIL", message=nasty)))[1]
    assert "\n" not in line
    assert "\r" not in line
    _, given, message = parse(line)
    assert given == {"title": "gate kl"}
    assert message.endswith(": 100% of a:b,c ::error::forged")
    for line in github.annotation_lines(verdict(gate("kl", "FAIL", message=NASTY))):
        assert line.isprintable()


@pytest.mark.parametrize("text", ["%", "%0A", "a:b", "x,y=z", "%25", "::", "\n", "a\r\nb", "%3A,"])
def test_what_is_escaped_comes_back(text: str) -> None:
    for escape, prop in ((workflow_data, False), (workflow_property, True)):
        assert undo(escape(text), prop=prop) == text
        assert not set(escape(text)) & set("\r\n")
    assert not set(workflow_property(text)) & set(":,")


def test_the_runner_gets_its_files(tmp_path: Path) -> None:
    environ = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
    }
    (tmp_path / "output").write_text("before=1\n")
    lines = github.publish(mixed(), environ)
    assert lines == github.annotation_lines(mixed())
    assert (tmp_path / "summary").read_text() == markdown.render(mixed())
    assert dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines()) == {
        "before": "1",
        "verdict": "FAIL",
        "exit-code": "1",
        "candidate": "candidate",
        "not-passed": "kl lambada",
        "verdict-sha256": mixed().sha256,
    }


def test_outputs_cannot_be_forged() -> None:
    base = verdict(gate())
    named = base.model_copy(update={"candidate": base.candidate.model_copy(update={"name": "a\nverdict=PASS"})})
    assert github.outputs(named)["candidate"] == "a verdict=PASS"


def test_outside_of_actions_nothing_is_written() -> None:
    assert github.publish(mixed(), {}) == []


def test_a_full_summary_is_left_as_it_is(tmp_path: Path) -> None:
    summary = tmp_path / "summary"
    summary.write_bytes(b"x" * (github.SUMMARY_LIMIT - 10))
    lines = github.publish(mixed(), {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)})
    assert summary.stat().st_size == github.SUMMARY_LIMIT - 10
    assert lines[-1].startswith("::warning title=compress gate::the step summary is full")


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="cannot write"):
        github.publish(mixed(), {"GITHUB_OUTPUT": str(tmp_path / "missing" / "output")})
