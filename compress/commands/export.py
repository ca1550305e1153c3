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
from compress.formats.names import FORMATS

TARGETS = ("dense", *FORMATS)


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Options of `compress export`."""

    artifact: Annotated[Path, typer.Argument(help="An artifact directory.", metavar="ARTIFACT", show_default=False)]
    to: Annotated[str, typer.Option("--to", help=f"{', '.join(TARGETS)}.", metavar="FORMAT", show_default=False)]
    output: Annotated[
        Path | None, typer.Option(help="The new directory; ARTIFACT-FORMAT if left out.", metavar="DIR")
    ] = None
    restart: Annotated[
        bool, typer.Option("--restart", help="Replace what --output holds once the new directory is complete.")
    ] = False


@command("export", Export, panel=MAKE)
def export(options: Export, view: View) -> None:
    """Write an artifact in another format. `dense` is a plain Hugging Face model with the decoded weights.

    The other formats hold the same codes and scales, and the result is an artifact too. What a format cannot carry as
    it is, is refused: nothing is rounded a second time.

    Examples:

      $ compress export ./artifact --to gptq
      $ compress export ./artifact --to dense
      $ compress export ./artifact --to dense --output ./model-for-another-engine
    """
    if options.to not in TARGETS:
        raise UserError(f"unknown export format {options.to!r}", f"this version writes {', '.join(TARGETS)}")
    _environment.prepare()
    from compress.artifact.reader import follow_latest

    source = follow_latest(options.artifact).resolve()
    output = options.output or source.with_name(f"{source.name}-{options.to}")
    if options.to != "dense":
        return _packed(source, output, options, view)
    from compress.exporters.dense import export_dense

    made = export_dense(source, output, restart=options.restart, progress=view.progress())
    _say_kept(made.kept_aside, view)
    view.note(one_line(f"{made.tensors} tensors, {size(made.bytes)}"))
    document = {"output": made.path, "format": options.to, "tensors": made.tensors, "bytes": made.bytes}
    view.result(document, [relative(made.path)])


def _packed(source: Path, output: Path, options: Export, view: View) -> None:
    from compress.exporters.packed import export_packed

    made = export_packed(source, output, options.to, restart=options.restart, progress=view.progress())
    _say_kept(made.kept_aside, view)
    manifest = made.artifact.manifest
    if made.complete_already:
        view.note("complete already: this artifact made what is there")
    view.note(one_line(f"{len(manifest.tensors)} tensors, {size(manifest.sizes.bytes)}, as they were"))
    document = {
        "output": made.artifact.path,
        "format": options.to,
        "tensors": len(manifest.tensors),
        "bytes": manifest.sizes.bytes,
        "artifact_id": made.artifact.artifact_id,
    }
    view.result(document, [relative(made.artifact.path)])


def _say_kept(aside: Path | None, view: View) -> None:
    if aside is not None:
        view.note(one_line(f"what was there and no artifact is kept in {relative(aside)}"))
