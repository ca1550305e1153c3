"""Exit codes and error lines, whatever goes wrong: a mistake in the command line, or an error from the library."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from compress.errors import IntegrityError, UserError, WorkError
from compress.workflows import api


def fail_with(error: BaseException) -> Callable[..., Any]:
    def raise_it(*args: object, **kwargs: object) -> Any:
        raise error

    return raise_it


class OutOfMemoryError(RuntimeError):
    """Named as torch names a full GPU."""


LIBRARY_ERRORS: list[tuple[BaseException, int, str]] = [
    (UserError("no such thing", "name another"), 2, "error: no such thing"),
    (WorkError("disk full", "free some"), 4, "error: disk full"),
    (IntegrityError("hash differs", "fetch again"), 5, "error: hash differs"),
    (MemoryError(), 4, "error: out of memory"),
    (OutOfMemoryError("CUDA out of memory"), 4, "error: out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 4, "error: out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), 4, "error: No space left on device: /tmp/x"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), 4, "error: Permission denied: /x"),
    (ZeroDivisionError("division by zero"), 4, "error: internal error: ZeroDivisionError: division by zero"),
    (KeyboardInterrupt(), 130, "error: interrupted"),
]


@pytest.mark.parametrize(
    ("error", "code", "line"), LIBRARY_ERRORS, ids=[type(e).__name__ for e, _, _ in LIBRARY_ERRORS]
)
@pytest.mark.parametrize("json_mode", [(), ("--json",)], ids=["plain", "json"])
def test_every_error_of_the_library_has_its_code_and_two_lines(
    run: Callable,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
    json_mode: tuple[str, ...],
) -> None:
    monkeypatch.setattr(api, "load", fail_with(error))
    assert run("generate", "--prompt", "x", *json_mode).refused(code) == line


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback_too(run: Callable, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(api, "load", fail_with(UserError("no such thing", "name another")))
    words = ["generate", "--prompt", "x"]
    result = run("--debug", *words) if where == "before" else run(*words, "--debug")
    assert result.code == 2
    assert "Traceback (most recent call last)" in result.err
    assert result.err.endswith("error: no such thing\nhint: name another\n")
    assert "Traceback" not in run(*words).err, "the flag must not outlive its command line"


def test_an_error_with_line_breaks_and_escapes_stays_one_harmless_line(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load", fail_with(UserError("bad\nname \x1b[31m" + "long " * 60, "fix\nit")))
    line = run("generate", "--prompt", "x").refused(2)
    assert "\x1b" not in line
    assert line.startswith("error: bad name \\x1b[31mlong long")


BAD_COMMAND_LINES: list[tuple[list[str], str]] = [
    (["quantise"], "unknown command 'quantise'"),
    (["plan", "qantize"], "unknown command 'qantize'"),
    (["plan"], "missing command"),
    (["--bogus"], "unknown option --bogus"),
    (["quantize", "--bitz", "4"], "unknown option --bitz"),
    (["quantize", "--bits"], "--bits"),
    (["quantize", "--bits", "four"], "--bits"),
    (["quantize", "a", "b"], "unexpected extra argument"),
    (["quantize", "--seed", "-1"], "--seed"),
    (["quantize", "--threads", "0"], "--threads"),
    (["quantize", "--method", "awk"], "did you mean `awq`?"),
    (["quantize", "--bits", "9"], "scheme.bits: 9 "),
    (["quantize", "--bits", "1"], "scheme.bits: 1 "),
    (["quantize", "--group-size", "x"], "group size 'x'"),
    (["quantize", "--group-size", "0"], "scheme.group_size: 0"),
    (["quantize", "--samples", "0"], "calibration.samples: 0"),
    (["quantize", "--scheme", "W8A16", "--bits", "4"], "contradicts bits 4"),
    (["quantize", "--scheme", "W4A16_ASYM", "--sym"], "contradicts sym"),
    (["quantize", "--scheme", "W4A16-g64", "--group-size", "32"], "contradicts group size 32"),
    (["quantize", "--scheme", "NVFP5"], "unknown scheme 'NVFP5'"),
    (["quantize", "--format", "gguf"], "unknown format 'gguf'"),
    (["quantize", "--recipe", "missing.yaml"], "no recipe at missing.yaml"),
    (["plan", "quantize", "--method", "awk"], "did you mean `awq`?"),
    (["run"], "missing argument"),
    (["run", "missing.yaml"], "no recipe at missing.yaml"),
    (["generate"], "--prompt"),
    (["generate", "--prompt", "x", "--max-tokens", "0"], "max_tokens"),
    (["generate", "--prompt", "x", "--temperature", "-1"], "temperature"),
    (["show"], "missing argument"),
    (["show", "nowhere"], "nowhere is not an artifact"),
    (["list", "nowhere"], "no directory nowhere"),
    (["verify", "nowhere"], "nowhere is not an artifact"),
    (["diff", "nowhere"], "missing argument"),
    (["diff", "nowhere", "neither"], "nowhere"),
    (["eval", "--attach"], "--attach needs an artifact"),
    (["gate"], "missing argument"),
    (["methods", "extra"], "unexpected extra argument"),
]


@pytest.mark.parametrize(("words", "said"), BAD_COMMAND_LINES, ids=[" ".join(words) for words, _ in BAD_COMMAND_LINES])
@pytest.mark.parametrize("json_mode", [False, True], ids=["plain", "json"])
def test_every_mistake_gets_an_error_and_a_hint(run: Callable, words: list[str], said: str, json_mode: bool) -> None:
    if json_mode and len(words) > 1:
        words = [*words, "--json"]
    assert said in run(*words).refused(2)


def test_the_nearest_option_and_command_are_named(run: Callable) -> None:
    assert "hint: did you mean `--bits`?" in run("quantize", "--bitz", "4").err
    assert "hint: did you mean `compress quantize`?" in run("quantise").err
    assert "hint: did you mean `compress plan quantize`?" in run("plan", "qantize").err


def test_what_a_library_prints_never_reaches_stdout(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(*args: object, **kwargs: object) -> Any:
        print("noise from a library")
        raise UserError("stop", "here")

    monkeypatch.setattr(api, "load", noisy)
    result = run("generate", "--prompt", "x", "--json")
    assert result.out == ""
    assert "noise from a library" in result.err


def test_no_color_and_pipes_get_plain_text(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (("quantise",), ("methods",), ("quantize", "--help")):
        result = run(*words)
        assert "\x1b" not in result.out + result.err


def test_color_on_a_terminal_unless_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.cli import main

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    for name, colored in (("NO_COLOR", False), (None, True)):
        monkeypatch.delenv("NO_COLOR", raising=False)
        if name:
            monkeypatch.setenv(name, "1")
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        assert main(["quantise"]) == 2
        assert ("\x1b[1;31merror: " in screen.getvalue()) is colored


def test_a_reader_that_goes_away_is_no_failed_gate() -> None:
    for words in (["methods", "--json"], ["quantize", "--help"]):
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys, time; from compress.cli import main; time.sleep(.5); sys.exit(main({words}))",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
        process.stderr.close()
        assert process.wait() == 141
        assert error == ""


def test_methods_is_one_json_document_with_every_method(run: Callable) -> None:
    from compress.distillation.configs import LOSSES
    from compress.pruning.configs import PRUNING_NAMES
    from compress.quantization.configs import METHOD_NAMES

    result = run("methods", "--json")
    assert result.code == 0
    assert set(result.json["methods"]) == {*METHOD_NAMES, *PRUNING_NAMES, *LOSSES}
    assert {name for name, m in result.json["methods"].items() if m["stage"] == "prune"} == set(PRUNING_NAMES)
    assert result.json["schemes"]["W4A16"] == {"bits": 4, "symmetric": True}
    assert json.dumps(result.json)
    plain = run("methods")
    assert all(name in plain.out for name in (*METHOD_NAMES, *PRUNING_NAMES))
    assert "damp_frac" in plain.err
    assert run("methods", "--quiet").err == ""
