"""`compress compare`: scored models side by side, and in pairs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.commands._command import command
from compress.commands._files import check_writable, write
from compress.commands._options import MEASURE, OUTPUT, Common
from compress.commands._output import View, columns, relative

if TYPE_CHECKING:
    from compress.evaluation.reports.compare import Comparison, Model
    from compress.evaluation.reports.document import Table


@dataclass(frozen=True, kw_only=True)
class Compare(Common):
    """Options of `compress compare`."""

    models: Annotated[
        list[str], typer.Argument(help="eval.json files, or artifacts that were scored.", metavar="A B [C ...]")
    ] = field(default_factory=list)
    text: Annotated[
        str | None,
        typer.Option(help="Scored text that the figures are about; the first common one if left out.", metavar="NAME"),
    ] = None
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with tables and pictures.", metavar="FILE", rich_help_panel=OUTPUT),
    ] = None
    svg: Annotated[
        Path | None,
        typer.Option(help="Write the picture of size against quality.", metavar="FILE", rich_help_panel=OUTPUT),
    ] = None


@command("compare", Compare, panel=MEASURE)
def compare(options: Compare, view: View) -> None:
    """Compare scored models: sizes and scores side by side, and each with the first, in pairs.

    Pairs on the same tokens and items tell far smaller differences than the two intervals do: ratios of KL and of
    perplexity, and changes of accuracy, each with a 95% interval. What the records do not allow is said, with the
    reason. Nothing is scored here.

    Examples:

      $ compress compare awq.eval.json gptq.eval.json
      $ compress compare artifacts/a/latest artifacts/b/latest --html compare.html
      $ compress compare a.json b.json c.json --svg front.svg --json
    """
    check_writable("--html", options.html)
    check_writable("--svg", options.svg)
    from compress.errors import UserError
    from compress.evaluation.reports import compare_document, html
    from compress.workflows.reports import compare as run

    found = run(options.models, options.text)
    if options.svg is not None:
        if not compare_document.comparable(found):
            raise UserError(
                "no picture of size against quality: no model has a KL to a baseline on the text",
                "score them against one model: `compress eval MODEL --baseline BASE`",
            )
        write(options.svg, compare_document.front_svg(found))
        view.note(f"picture written to {relative(options.svg)}")
    if options.html is not None:
        write(options.html, html.document(compare_document.comparison_document(found)))
        view.note(f"page written to {relative(options.html)}")
    scores, paired = compare_document.scores_table(found), compare_document.paired_table(found)
    lines = _plain(scores if len(found.models) > 4 else _turned(scores))
    if found.paired:
        lines += ["", f"against {found.models[0].name}, in pairs:", *_plain(paired)]
    lines += [f"not compared: {u.second}: {u.what}: {u.why}" for u in found.unpaired]
    view.result(_document(found), lines)


def _turned(table: Table) -> Table:
    """Rows and columns exchanged, which reads better for few models."""
    from compress.evaluation.reports.document import Table

    names = [column.lstrip(">") for column in table.columns]
    rows = zip(*table.rows, strict=True)
    header, *body = [(name, *cells) for name, cells in zip(names, rows, strict=True)]
    return Table(("", *header[1:]), tuple(body))


def _plain(table: Table) -> list[str]:
    return columns([[c.lstrip(">") for c in table.columns], *table.rows])


def _document(found: Comparison) -> dict[str, Any]:
    return {
        "text": found.text,
        "models": [_model(model) for model in found.models],
        "paired": [asdict(pair) for pair in found.paired],
        "unpaired": [asdict(pair) for pair in found.unpaired],
    }


def _model(model: Model) -> dict[str, Any]:
    record = model.record
    return {
        "name": model.name,
        "artifact_id": record.artifact_id,
        "digest": record.model.digest,
        "record_sha256": record.sha256,
        "baseline": None
        if record.baseline is None
        else {"name": record.baseline.name, "digest": record.baseline.digest},
        "weights_bytes": record.model.weights_bytes,
        "bits_per_weight": record.model.bits_per_weight,
        "summary": None if model.text is None else model.text.summary,
        "tasks": model.tasks,
        "best_for_its_size": model.best,
    }
