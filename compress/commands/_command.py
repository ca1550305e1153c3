"""A command whose options are a dataclass, so that two commands can share them and tests can build them.

A command is a function `(options, view) -> Outcome | None`. Typer gets a signature made from the dataclass fields, and
stdout is kept for results: whatever a library prints meanwhile goes to stderr.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from typing import Any, TypeVar, get_type_hints

import typer

from compress.commands._options import Common
from compress.commands._output import View

Options = TypeVar("Options", bound=Common)


class Outcome(Enum):
    """How a command ended when nothing went wrong; `cli.py` gives each its exit code."""

    OK = "ok"
    GATE_FAILED = "gate failed"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand ready to be added to an app; its help text is the docstring of its function."""

    name: str
    callback: Callable[..., Outcome]
    panel: str | None

    def add_to(self, app: typer.Typer) -> None:
        """Registers it."""
        app.command(self.name, rich_help_panel=self.panel)(self.callback)


def command(
    name: str, options: type[Options], *, panel: str | None = None
) -> Callable[[Callable[[Options, View], Outcome | None]], Command]:
    """Decorator: makes `function(options, view)` the command `name`."""

    def build(function: Callable[[Options, View], Outcome | None]) -> Command:
        def callback(**given: Any) -> Outcome:
            view = View(json_mode=given["json_mode"], quiet=given["quiet"], stdout=sys.stdout)
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    return function(options(**given), view) or Outcome.OK
            finally:
                view.close()

        hints = get_type_hints(options, include_extras=True)
        callback.__doc__ = help_text(function.__doc__ or "")
        callback.__name__ = function.__name__
        callback.__annotations__ = {field.name: hints[field.name] for field in _in_help_order(options)}
        callback.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name], default=_default(field)
                )
                for field in _in_help_order(options)
            ]
        )
        return Command(name, callback, panel)

    return build


def help_text(docstring: str) -> str:
    """The docstring with its paragraphs unwrapped, so that they fill the terminal; `$ ...` lines stay lines."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(
        "\n".join(line.strip() for line in p.splitlines()) if p.lstrip().startswith("$ ") else " ".join(p.split())
        for p in paragraphs
    )


def _in_help_order(options: type[Common]) -> list[Field[Any]]:
    """The fields of the class itself first, then those of each class it builds on; what all commands share is last."""
    ordered: list[str] = []
    for kind in options.__mro__:
        ordered += [name for name in inspect.get_annotations(kind) if name not in ordered]
    by_name = {field.name: field for field in fields(options)}
    return [by_name[name] for name in ordered]


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else inspect.Parameter.empty
