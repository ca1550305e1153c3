"""`compress diff`: what differs between two artifacts, or an artifact and a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.commands._command import command
from compress.commands._options import LOOK, Common
from compress.commands._output import View, number, numberless, relative

if TYPE_CHECKING:
    from compress.artifact.diff import Change
    from compress.artifact.tensor_diff import TensorChange

SECTIONS = ("recipe", "made_with", "config", "files", "sizes", "scores")


@dataclass(frozen=True, kw_only=True)
class Diff(Common):
    """Options of `compress diff`."""

    a: Annotated[Path, typer.Argument(help="Artifact or model directory.", metavar="A", show_default=False)]
    b: Annotated[Path, typer.Argument(help="Another.", metavar="B", show_default=False)]


@command("diff", Diff, panel=LOOK)
def diff(options: Diff, view: View) -> None:
    """Show what differs between two artifacts, or an artifact and a model: recipe, config, tensors, sizes, scores.

    The exit code is 0 whether they differ or not; `same` in the JSON document says which.

    Examples:

      $ compress diff ./artifacts/my-model/v1 ./artifacts/my-model/v2
      $ compress diff ./model ./artifact --json
    """
    from compress.artifact.diff import diff as compare

    found = compare(options.a, options.b)
    document: dict[str, Any] = {"a": found.a, "b": found.b, "same": found.same}
    document |= {section: getattr(found, section) for section in (*SECTIONS, "tensors")}
    lines = [f"{'same model' if found.same else 'different'}: {relative(found.a)} and {relative(found.b)}"]
    for section in SECTIONS:
        lines += [_change(section, change) for change in getattr(found, section)]
    view.result(document, [*lines, *_tensors(found.tensors)])


def _change(section: str, change: Change) -> str:
    return f"{section:<9}  {change.where}: {_value(change.a)} -> {_value(change.b)}"


def _tensors(changes: list[TensorChange]) -> list[str]:
    """One line per kind of tensor: the same name apart from numbers, changed in the same way."""
    kinds: dict[tuple[str, str, str], list[TensorChange]] = {}
    for change in changes:
        layouts = f"{change.a or '-'} -> {change.b or '-'}" if change.a != change.b else str(change.a)
        kinds.setdefault((numberless(change.name), change.kind, layouts), []).append(change)
    return [
        f"{'tensors':<9}  {name} ({len(members)}): {kind}, {layouts}{_extent(members)}"
        for (name, kind, layouts), members in kinds.items()
    ]


def _extent(members: list[TensorChange]) -> str:
    """How much changed at most, where that was measured."""
    codes = [change.codes_differing for change in members if change.codes_differing is not None]
    values = [change.relative_change for change in members if change.relative_change is not None]
    return (f", up to {max(codes):.2%} of the codes differ" if codes else "") + (
        f", relative change up to {number(max(values))}" if values else ""
    )


def _value(value: Any) -> str:
    if value is None:
        return "-"
    text = number(value, 6) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
