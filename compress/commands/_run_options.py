"""Options of `compress run`, and of its plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._options import (
    METHOD,
    Processes,
    Run,
)


@dataclass(frozen=True, kw_only=True)
class RunRecipe(Run):
    """`compress run` and `compress plan run`."""

    recipe: Annotated[
        Path,
        typer.Argument(help="Recipe, a YAML file or a shipped name.", metavar="RECIPE", show_default=False),
    ]
    model: Annotated[
        str | None,
        typer.Option(help="Source model, in place of the recipe's `model`.", metavar="MODEL", rich_help_panel=METHOD),
    ] = None
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set", help="Override one key, as in stages.0.scheme.bits=3.", metavar="KEY=VALUE", rich_help_panel=METHOD
        ),
    ] = field(default_factory=list)
    processes: Processes = 1
