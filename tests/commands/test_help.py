"""Help: every command has examples that parse, and answering costs no heavy import."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer

from compress.cli import app

ROOT = typer.main.get_command(app)


def leaves(command: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    children = getattr(command, "commands", None)
    if not children:
        return [path]
    return [leaf for name, child in children.items() for leaf in leaves(child, (*path, name))]


COMMANDS = leaves(ROOT)
NAMES = [" ".join(path) for path in COMMANDS]


def find(path: tuple[str, ...]) -> object:
    command: object = ROOT
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    return command


def test_the_commands_of_the_contract_are_there() -> None:
    expected = {"quantize", "run", "plan quantize", "plan run", "generate", "eval", "gate", "export"}
    expected |= {"show", "list", "verify", "diff", "methods", "doctor"}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("path", COMMANDS, ids=NAMES)
def test_every_command_has_help_with_examples_and_the_common_options(path: tuple[str, ...], run: Callable) -> None:
    result = run(*path, "--help")
    assert result.code == 0
    assert result.err == ""
    assert "Examples:" in result.out
    for option in ("--json", "--quiet", "--debug", "--help"):
        assert option in result.out


@pytest.mark.parametrize("path", COMMANDS, ids=NAMES)
def test_examples_are_command_lines_that_parse(path: tuple[str, ...]) -> None:
    command = find(path)
    lines = [line.strip() for line in str(command.help).splitlines() if line.strip().startswith("$ ")]  # type: ignore[attr-defined]
    assert lines
    for line in lines:
        program, *words = shlex.split(line.removeprefix("$ "))
        assert program == "compress"
        assert tuple(words[: len(path)]) == path
        command.make_context(line, words[len(path) :])  # type: ignore[attr-defined]
        assert len(line) <= 78, "wider than the help on 80 columns"


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_program_alone_shows_its_commands(run: Callable, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.code == 0
    for name in NAMES:
        assert name.split()[0] in result.out


def test_version(run: Callable) -> None:
    import compress

    assert run("--version").out == f"compress {compress.__version__}\n"


def test_plan_takes_the_options_of_what_it_plans() -> None:
    for name in ("quantize", "run"):
        options = [[p.opts for p in find(path).params] for path in ((name,), ("plan", name))]  # type: ignore[attr-defined]
        assert options[0] == options[1]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, contextlib, io\n"
        "from compress.cli import main\n"
        f"for path in {COMMANDS!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        assert main([*path, '--help']) == 0\n"
        "    assert out.getvalue()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print('clean')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "clean\n", done.stderr
