"""`compress trend`: gate values over releases, and what drifts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.commands._command import Outcome, command
from compress.commands._files import check_writable, write
from compress.commands._options import MEASURE, OUTPUT, Common
from compress.commands._output import View, columns, relative

if TYPE_CHECKING:
    from compress.evaluation.reports.trend import GateTrend, Trend

ADD = "Add a run"


@dataclass(frozen=True, kw_only=True)
class TrendOptions(Common):
    """Options of `compress trend`."""

    directory: Annotated[Path, typer.Argument(help="Where history.jsonl lies.", metavar="DIR", show_default=False)]
    add: Annotated[
        Path | None,
        typer.Option(help="Verdict to append first, as `compress gate` wrote it.", metavar="FILE", rich_help_panel=ADD),
    ] = None
    commit: Annotated[
        str | None,
        typer.Option(
            help="Commit that was gated.", metavar="SHA", envvar=["GITHUB_SHA", "CI_COMMIT_SHA"], rich_help_panel=ADD
        ),
    ] = None
    release: Annotated[
        str | None, typer.Option(help="Release that this commit makes.", metavar="NAME", rich_help_panel=ADD)
    ] = None
    fail_on_drift: Annotated[bool, typer.Option("--fail-on-drift", help="Exit with 1 if anything is flagged.")] = False
    html: Annotated[
        Path | None, typer.Option(help="Write a page with tables and pictures.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None
    svg: Annotated[
        Path | None, typer.Option(help="Write the picture of all gates.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None


@command("trend", TrendOptions, panel=MEASURE)
def trend(options: TrendOptions, view: View) -> Outcome:
    """Follow gate values over the runs of a project, one line per run in DIR/history.jsonl.

    Ten releases may each lose so little that they pass, and together lose too much. Each gate's newest value is
    compared with the last release; a steady drift, and steps that add up to more than one step may lose, are flagged.
    Only runs of one environment and one text are compared.

    Examples:

      $ compress trend quality
      $ compress trend quality --add verdict.json --commit 1a2b3c4 --release v1.2
      $ compress trend quality --html trend.html --fail-on-drift
    """
    check_writable("--html", options.html)
    check_writable("--svg", options.svg)
    from compress.evaluation.reports import html, trend_document
    from compress.workflows.reports import trend as run

    found = run(options.directory, options.add, commit=options.commit, release=options.release)
    if options.html is not None:
        write(options.html, html.document(trend_document.trend_document(found)))
        view.note(f"page written to {relative(options.html)}")
    if options.svg is not None:
        write(options.svg, trend_document.trend_svg(found))
        view.note(f"picture written to {relative(options.svg)}")
    table = trend_document.gates_table(found)
    lines = columns([[column.lstrip(">") for column in table.columns], *table.rows])
    view.result(_document(found), lines)
    for flag in found.flags:
        view.warn(flag)
    return Outcome.GATE_FAILED if options.fail_on_drift and found.flags else Outcome.OK


def _document(found: Trend) -> dict[str, Any]:
    return {
        "runs": [line.model_dump(mode="json", exclude={"gates"}) for line in found.lines],
        "gates": [_gate(gate) for gate in found.gates],
        "flags": found.flags,
    }


def _gate(gate: GateTrend) -> dict[str, Any]:
    return {
        "id": gate.id,
        "baseline": gate.baseline,
        "values": [
            {"commit": run.line.commit, "release": run.line.release, **run.gate.model_dump(mode="json")}
            for run in gate.runs
        ],
        "since": None if gate.since is None else gate.since.line.name,
        "change": gate.change,
        "noise": gate.noise,
        "steps": gate.steps,
        "steps_together": gate.total,
        "drift_p": gate.drift_p,
        "flags": gate.flags,
    }
