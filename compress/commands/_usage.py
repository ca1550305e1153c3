"""Mistakes in the command line itself: unknown commands and options get the nearest one that exists."""

from __future__ import annotations

import difflib
from typing import Any

import typer.core

from compress.errors import UserError


class Group(typer.core.TyperGroup):
    """The command group, with commands listed in order of registration and unknown ones answered by name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the base class, but an unknown name is a UserError."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            close = difflib.get_close_matches(args[0], list(self.commands), n=1, cutoff=0.5)
            hint = f"did you mean `{ctx.command_path} {close[0]}`?" if close else f"see `{ctx.command_path} --help`"
            raise UserError(f"unknown command {args[0]!r}", hint)
        return super().resolve_command(ctx, args)


def usage_problem(error: Exception) -> tuple[str, str] | None:
    """Message and hint for an error of the option parser; None where `error` is something else.

    The parser's exceptions are recognised by what they carry, since Typer has moved their classes between releases.
    """
    if getattr(error, "exit_code", None) != 2 or not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "compress"
    help_hint = f"see `{path} --help`"
    unknown = getattr(error, "option_name", None)
    if unknown is not None and type(error).__name__ == "NoSuchOption":
        close = difflib.get_close_matches(unknown, _options(context), n=1, cutoff=0.6)
        return f"unknown option {unknown}", f"did you mean `{close[0]}`? {help_hint}" if close else help_hint
    message = str(error.format_message()).rstrip(".").replace("Input should be", "it must be")
    return message[:1].lower() + message[1:], help_hint


def _options(context: Any) -> list[str]:
    if context is None:
        return []
    return [name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
