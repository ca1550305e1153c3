"""What people read: numbers, sizes and times in words, progress on terminals and in logs, and plain data for JSON."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from compress.commands import _output
from compress.commands._output import View, columns, duration, facts, number, numberless, one_line, plain, size
from compress.commands._progress import LineProgress, TerminalProgress
from compress.recipe import parse_recipe


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (11547040, "11.55 MB"), (2.5e12, "2.5 TB"), (None, "-")],
)
def test_sizes_are_decimal(count: float | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_names_and_lines() -> None:
    assert [number(x) for x in (4.12512, None, math.nan, 0.0001234567)] == ["4.125", "-", "-", "0.0001235"]
    assert numberless("model.layers.11.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert one_line("a\nb\x1b[0mc\u202e") == "a b\\x1b[0mc\\u202e"
    assert facts([("a", 1), ("longer", "x"), ("gone", None)]) == ["a       1", "longer  x"]
    assert columns([("A", "B"), ("long", 2)]) == ["A     B", "long  2"]
    assert columns([]) == []


def test_plain_data_survives_json() -> None:
    value = {
        "nan": math.nan,
        "inf": -math.inf,
        "path": Path("a/b"),
        "tensor": torch.tensor(2.5),
        3: (1, [True, None]),
        "recipe": parse_recipe({"stages": [{"method": "rtn"}]}),
    }
    found = json.loads(json.dumps(plain(value), allow_nan=False))
    assert found.pop("recipe")["stages"][0]["method"]["kind"] == "rtn"
    assert found == {"nan": None, "inf": None, "path": "a/b", "tensor": 2.5, "3": [1, [True, None]]}


def test_the_json_document_is_all_of_stdout_and_notes_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    view = View(json_mode=True, quiet=False)
    view.note("a [bracketed] note")
    view.table("T", ("A", ">B"), [("[x]", 1)])
    view.warn("careful\nnow")
    view.result({"a": math.nan}, ["never shown"])
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"a": None}
    assert "a [bracketed] note" in shown.err
    assert "[x]" in shown.err
    assert "warning: careful now\n" in shown.err


def test_quiet_leaves_results_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    view = View(json_mode=False, quiet=True)
    view.note("note")
    view.table("T", ("A",), [("x",)])
    progress = view.progress()
    progress.begin("work", 1)
    progress.advance("x")
    progress.end()
    progress.warn("look")
    view.result({}, ["result"])
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("result\n", "warning: look\n")


def test_a_log_gets_a_line_now_and_then_with_the_time_left() -> None:
    now, said = [0.0], []
    progress = LineProgress(said.append, said.append, clock=lambda: now[0])
    progress.begin("quantising", 10)
    for step in range(10):
        now[0] += 4
        progress.advance(f"block {step}")
    progress.end()
    assert said == [
        "quantising: 4/10 (block 3), about 24 s left",
        "quantising: 8/10 (block 7), about 8.0 s left",
        "quantising: done in 40 s",
    ]


def test_a_terminal_gets_a_bar_that_leaves_one_line() -> None:
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    progress = TerminalProgress(console, lambda message: None)
    progress.begin("quantising [x]", 2)
    progress.advance("block 0")
    progress.advance("block 1")
    progress.end()
    assert screen.getvalue().rstrip().splitlines()[-1].endswith("quantising [x]: done in 0.0 s")
    assert "2/2" in screen.getvalue()
    progress.begin("scoring", 3)
    progress.close()
    assert "scoring: done" not in screen.getvalue()


def test_progress_fits_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(View(json_mode=True, quiet=False).progress(), TerminalProgress)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(View(json_mode=True, quiet=False).progress(), LineProgress)


def test_paths_are_shown_as_typed_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _output.relative(tmp_path / "a/b") == "a/b"
    assert _output.relative(tmp_path.parent / "c") == str(tmp_path.parent / "c")
