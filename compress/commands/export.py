"""`compress export`: an artifact in another engine's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from compress.commands import _environment
from compress.commands._command import command
from compress.commands._options import MAKE, Common
from compress.commands._output import View, one_line, relative, size
from compress.errors import UserError

TARGETS = ("dense",)


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Options of `compress export`."""

    artifact: Annotated[Path, typer.Argument(help="An artifact directory.", metavar="ARTIFACT", show_default=False)]
    to: Annotated[str, typer.Option("--to", help=f"{', '.join(TARGETS)}.", metavar="FORMAT", show_default=False)]
    output: Annotated[
        Path | None, typer.Option(help="The new directory; ARTIFACT-FORMAT if left out.", metavar="DIR")
    ] = None


@command("export", Export, panel=MAKE)
def export(options: Export, view: View) -> None:
    """Write an artifact in another format. `dense` is a plain Hugging Face model with the decoded weights.

    Examples:

      $ compress export ./artifact --to dense
      $ compress export ./artifact --to dense --output ./model-for-another-engine
    """
    if options.to not in TARGETS:
        raise UserError(f"unknown export format {options.to!r}", f"this version writes {', '.join(TARGETS)}")
    _environment.prepare()
    from compress.artifact.reader import follow_latest
    from compress.exporters.dense import export_dense

    source = follow_latest(options.artifact).resolve()
    output = options.output or source.with_name(f"{source.name}-{options.to}")
    made = export_dense(source, output, progress=view.progress())
    view.note(one_line(f"{made.tensors} tensors, {size(made.bytes)}"))
    document = {"output": made.path, "format": options.to, "tensors": made.tensors, "bytes": made.bytes}
    view.result(document, [relative(made.path)])
