"""`compress report`: artifacts and verdicts as pages, comments and test results."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.commands._command import command
from compress.commands._files import check_writable, write
from compress.commands._options import LOOK, OUTPUT, Common
from compress.commands._output import View, relative
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.evaluation.reports.document import Document, Section


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """Options of `compress report`."""

    sources: Annotated[
        list[str],
        typer.Argument(help="Artifacts, or verdict files that `compress gate` wrote.", metavar="ARTIFACT..."),
    ] = field(default_factory=list)
    verdict: Annotated[
        Path | None, typer.Option(help="What a gate said of the one artifact given.", metavar="FILE")
    ] = None
    html: Annotated[
        Path | None, typer.Option(help="Write a page that needs nothing else.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None
    markdown: Annotated[
        Path | None, typer.Option(help="Write Markdown to this file.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None
    junit: Annotated[
        Path | None, typer.Option(help="Write a verdict as JUnit XML.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None
    github: Annotated[
        bool,
        typer.Option(
            "--github", help="Publish a verdict as step summary, outputs and annotations.", rich_help_panel=OUTPUT
        ),
    ] = False


@command("report", Report, panel=LOOK)
def report(options: Report, view: View) -> None:
    """Report on artifacts: what each is, where its error went, what it scores, and what the gate said.

    Without an output option the report goes to stdout as Markdown. A verdict file alone gives the report of the gate,
    in every form that `compress gate` itself writes.

    Examples:

      $ compress report ./artifact
      $ compress report ./artifact --verdict verdict.json --html report.html
      $ compress report verdict.json --junit gate.xml --markdown comment.md
    """
    for name, path in (("--html", options.html), ("--markdown", options.markdown), ("--junit", options.junit)):
        check_writable(name, path)
    from compress.evaluation.reports import github, html, junit, markdown
    from compress.workflows import reports

    document = reports.report(options.sources, options.verdict)
    alone = len(options.sources) == 1 and reports.is_verdict(options.sources[0])
    judged = options.sources[0] if alone else options.verdict
    if judged is None and (options.junit is not None or options.github):
        raise UserError("--junit and --github need a verdict", "give a verdict file, or --verdict FILE")
    verdict = None if judged is None else reports.verdict_of(judged)
    text = markdown.render(verdict) if alone and verdict is not None else markdown.document(document)
    if options.html is not None:
        write(options.html, html.document(document))
        view.note(f"page written to {relative(options.html)}")
    if options.markdown is not None:
        write(options.markdown, text)
        view.note(f"Markdown written to {relative(options.markdown)}")
    if options.junit is not None and verdict is not None:
        write(options.junit, junit.render(verdict))
        view.note(f"JUnit XML written to {relative(options.junit)}")
    if options.github and verdict is not None:
        for line in github.publish(verdict, os.environ):
            view.annotate(line)
    written = options.html or options.markdown or options.junit or options.github
    view.result(_plain(document), [] if written else text.splitlines())


def _plain(document: Document) -> dict[str, Any]:
    return {
        "title": document.title,
        "status": document.status,
        "lead": document.lead,
        "sections": [_section(section) for section in document.sections],
    }


def _section(section: Section) -> dict[str, Any]:
    table = section.table
    return {
        "heading": section.heading,
        "text": section.text,
        "facts": dict(section.facts),
        "table": None
        if table is None
        else {"columns": [column.lstrip(">") for column in table.columns], "rows": table.rows},
        "code": section.code,
    }
