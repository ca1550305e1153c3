"""`compress list`: the artifacts there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.commands._command import command
from compress.commands._options import LOOK, Common
from compress.commands._output import View, columns, number, relative, size

if TYPE_CHECKING:
    from compress.artifact.scores import Score


@dataclass(frozen=True, kw_only=True)
class List(Common):
    """Options of `compress list`."""

    directory: Annotated[Path, typer.Argument(help="Where to look.", metavar="DIR")] = Path("artifacts")


@command("list", List, panel=LOOK)
def list_(options: List, view: View) -> None:
    """List the artifacts in a directory, three levels deep. `*` marks the one that `latest` names.

    The scores are those of the attached eval.json against the parent: mean KL in nats per token, share of tokens with
    the same likeliest next token, perplexity over the parent's. `-` where an artifact was not scored; scores against
    another model than the parent end with `against` and its name.

    Examples:

      $ compress list
      $ compress list ./models --json
    """
    from compress.artifact.store import list_artifacts
    from compress.errors import UserError

    if not options.directory.is_dir() and options.directory != Path("artifacts"):
        raise UserError(f"there is no directory {options.directory}", "give a directory that holds artifacts")
    rows = list_artifacts(options.directory)
    lines = columns(
        [
            ("PATH", "METHOD", "SCHEME", "BITS", "SIZE", "ID", "MADE", "KL", "TOP-1", "PPL RATIO", ""),
            *(
                (
                    relative(row.path) + (" *" if row.latest else ""),
                    row.method,
                    row.scheme,
                    number(row.bits_per_weight),
                    size(row.bytes),
                    (row.artifact_id or "-")[:12],
                    (row.created or "-")[:10],
                    _value(row.scores.get("kl_mean")),
                    _share(row.scores.get("top1_agreement")),
                    _value(row.scores.get("perplexity_ratio")),
                    "" if row.against is None else f"against {row.against}",
                )
                for row in rows
                if row.problem is None
            ),
        ]
    )
    view.result({"directory": options.directory, "artifacts": rows}, lines if rows else [])
    for row in rows:
        if row.problem is not None:
            view.warn(f"{relative(row.path)}: {row.problem}")
    if not rows:
        view.note(f"no artifacts in {options.directory}; `compress quantize --method awq --bits 4` makes one")


def _value(score: Score | None) -> str:
    return number(None if score is None else score.value)


def _share(score: Score | None) -> str:
    return "-" if score is None else f"{score.value:.1%}"
