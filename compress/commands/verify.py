"""`compress verify`: whether every byte of an artifact is as it was published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._command import command
from compress.commands._options import LOOK, Common
from compress.commands._output import View, one_line, relative, size
from compress.errors import IntegrityError


@dataclass(frozen=True, kw_only=True)
class Verify(Common):
    """Options of `compress verify`."""

    artifact: Annotated[Path, typer.Argument(help="An artifact directory.", metavar="ARTIFACT", show_default=False)]


@command("verify", Verify, panel=LOOK)
def verify(options: Verify, view: View) -> None:
    """Check every file of an artifact, attachments too, against its manifest, and the manifest against itself.

    Exit code 5, with the problems listed, if anything is not as it was published.

    Examples:

      $ compress verify artifacts/tales-6m-awq-w4a16-g128/latest
      $ compress verify ./artifact --json
    """
    from compress.artifact.verify import verify as check

    report = check(options.artifact)
    document = {
        "path": report.path,
        "ok": report.ok,
        "artifact_id": report.artifact_id,
        "files": report.files,
        "bytes": report.bytes,
        "problems": report.problems,
    }
    if report.ok:
        view.result(document, [f"ok: {report.files} files, {size(report.bytes)}, id {report.artifact_id}"])
        return
    view.result(document, [one_line(str(problem)) for problem in report.problems])
    count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
    raise IntegrityError(
        f"{relative(options.artifact)} is not as it was published: {count}, the first: {report.problems[0]}",
        "fetch it again, or make it again: `compress run` with its recipe.yaml and another --output",
    )
