"""The `compress` command: registers the subcommands, and alone decides what becomes which exit code.

Nothing heavy is imported here: `compress --help` answers without torch. Installed as `compress.cli`; in a checkout
`python cli.py` runs the same code.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from compress.commands import _debug
from compress.commands._command import Outcome
from compress.commands._output import one_line
from compress.commands._registry import register_all
from compress.commands._usage import Group, usage_problem
from compress.distillation import processes
from compress.errors import CompressError, IntegrityError, UserError, WorkError

EXIT_CODES: dict[type[CompressError], int] = {UserError: 2, WorkError: 4, IntegrityError: 5}
OUTCOME_CODES = {Outcome.OK: 0, Outcome.GATE_FAILED: 1, Outcome.INCONCLUSIVE: 3}
INTERRUPTED = 130
PIPE_CLOSED = 141  # what a program killed by SIGPIPE reports; 1 would read as a failed gate

app = typer.Typer(
    name="compress",
    cls=Group,
    help="Make open-weight language models smaller, and prove that they are still good enough.",
    epilog="Start with: compress quantize --method awq --bits 4",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error.", callback=_debug.remember, is_eager=True),
    ] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"compress {installed('compress')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


register_all(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (`sys.argv` if None) and returns its exit code; never raises, never shows a traceback
    unless `--debug` was given."""
    _debug.reset()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _invoke(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _interrupted()
    except CompressError as error:
        return _report(error, error.message, error.hint, _code(error))
    except BrokenPipeError:
        return _closed_pipe()
    except OSError as error:
        return _operating_system(error)
    except Exception as error:
        usage = usage_problem(error)
        if usage is not None:
            return _report(error, *usage, 2)
        if _out_of_memory(error):
            return _report(error, "out of memory", "free some; fewer --samples or a shorter --seq-len need less", 4)
        message = f"internal error: {type(error).__name__}: {error}"
        hint = "this is a defect of compress: run it again with --debug and report what it shows"
        return _report(error, message, hint, 4)


def script() -> None:
    """The console script: runs `main` and ends the process without the interpreter's tear-down, which takes torch a
    quarter of a second. Everything that has to be finished is finished when `main` returns.

    Of several processes that `accelerate launch` or `torchrun` started, one runs `main`, and the others help it."""
    code = main() if processes.launched() == 1 else _launched()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or PIPE_CLOSED
    os._exit(code)


def _launched() -> int:
    """The exit code of one of several processes."""
    if processes.rank() > 0:
        from compress.pipeline import helper

        return helper.main()
    from compress.pipeline import helpers

    return helpers.dismissed(main)


def _invoke(argv: list[str]) -> int:
    """Runs the app without its own error handling."""
    try:
        outcome: Any = typer.main.get_command(app).main(argv, prog_name="compress", standalone_mode=False)
    except SystemExit as leaving:  # the app's answer to a closed pipe
        if leaving.code == 1:
            raise BrokenPipeError from leaving
        return int(leaving.code or 0)
    if outcome == INTERRUPTED:
        raise KeyboardInterrupt
    return OUTCOME_CODES[outcome] if isinstance(outcome, Outcome) else int(outcome or 0)


def _code(error: CompressError) -> int:
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 4)


def _operating_system(error: OSError) -> int:
    """A full disk, a missing permission and their kin: the work failed, not the program."""
    if error.errno == errno.EPIPE:
        return _closed_pipe()
    where = f": {error.filename}" if error.filename else ""
    reason = os.strerror(error.errno) if error.errno else str(error)
    hint = "check that the path exists and that you may read and write it; --debug shows where it failed"
    if error.errno == errno.ENOSPC:
        hint = "free space there and run the same command again: it resumes"
    return _report(error, f"{reason}{where}", hint, 4)


def _out_of_memory(error: Exception) -> bool:
    """torch has its own error for a full GPU, and a plain RuntimeError for a full machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _interrupted() -> int:
    print(file=sys.stderr)
    _print_lines("interrupted", "run the same command again: a quantisation resumes after its last finished block")
    return INTERRUPTED


def _closed_pipe() -> int:
    """The reader went away: say nothing, and keep the interpreter from complaining when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


def _report(error: BaseException, message: str, hint: str, code: int) -> int:
    if _debug.wanted():
        traceback.print_exception(error, file=sys.stderr)
    _print_lines(message, hint)
    return code


def _print_lines(message: str, hint: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stderr)
    for label, style, text in (("error: ", "bold red", message), ("hint: ", "bold cyan", hint)):
        console.print(Text.assemble((label, style), one_line(text)), soft_wrap=True)


if __name__ == "__main__":
    script()
