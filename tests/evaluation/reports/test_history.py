"""history.jsonl: appended line by line, never twice, and refused where it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import IntegrityError, UserError, WorkError
from compress.evaluation.reports.history import HISTORY, append_history, environment_sha256, line_of, read_history
from tests.evaluation.gate_records import environment
from tests.evaluation.reports.made import gate, mixed, verdict


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    first, second = line_of(verdict(gate()), "aaa"), line_of(mixed(), "bbb", "v1")
    assert append_history(tmp_path / "new" / "folder", first)
    assert append_history(tmp_path / "new" / "folder", second)
    assert read_history(tmp_path / "new" / "folder") == [first, second]
    assert (tmp_path / "new" / "folder" / HISTORY).read_bytes().count(b"\n") == 2


def test_a_line_holds_what_the_verdict_says() -> None:
    line = line_of(mixed(), "0123456789abcdef", "v1")
    assert (line.commit, line.release, line.name, line.date) == ("0123456789abcdef", "v1", "v1", "2026-11-21")
    assert line_of(mixed(), "0123456789abcdef").name == "01234567"
    assert (line.verdict, line.verdict_sha256) == ("FAIL", mixed().sha256)
    assert line.candidate_digest == mixed().candidate.digest
    kl = next(each for each in line.gates if each.id == "kl")
    assert (kl.estimate, kl.low, kl.high, kl.limit, kl.verdict) == (0.031, 0.028, 0.034, 0.02, "FAIL")
    lambada = next(each for each in line.gates if each.id == "lambada")
    assert lambada.baseline_digest == mixed().baselines["last"].digest


def test_the_same_run_is_added_once(tmp_path: Path) -> None:
    line = line_of(mixed(), "aaa")
    assert append_history(tmp_path, line)
    assert not append_history(tmp_path, line)
    assert append_history(tmp_path, line_of(mixed(), "aaa", "v1"))
    assert len(read_history(tmp_path)) == 2


def test_threads_are_no_other_environment_but_versions_are() -> None:
    base = environment_sha256(environment())
    assert environment_sha256(environment(threads=8)) == base
    assert environment_sha256(environment(versions={"torch": "2"})) != base
    assert environment_sha256(environment(machine="arm64")) != base


def test_no_history_is_a_mistake_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no history\.jsonl"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-20], "line 2 is cut"),
        (lambda data: data.replace(b'"commit":"aaa"', b'"commit":3'), "line 1 is no history line"),
        (lambda data: data.replace(b'"kind":"compress.history"', b'"kind":"other"', 1), "line 1 is no history line"),
        (lambda data: data + b"{}\n", "line 3 is no history line"),
    ],
)
def test_a_damaged_history_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    append_history(tmp_path, line_of(verdict(gate()), "aaa"))
    append_history(tmp_path, line_of(mixed(), "bbb"))
    path = tmp_path / HISTORY
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    for use in (lambda: read_history(tmp_path), lambda: append_history(tmp_path, line_of(mixed(), "ccc"))):
        with pytest.raises(IntegrityError, match=message):
            use()


def test_a_run_needs_a_name() -> None:
    for commit, release in (("", None), (" \n", None), ("aaa", "\x1b")):
        with pytest.raises(UserError, match="has no name"):
            line_of(mixed(), commit, release)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match="cannot create"):
        append_history(tmp_path / "file" / "folder", line_of(mixed(), "aaa"))
