"""Comparisons, trends and reports as functions: from paths to documents. Reads records, verdicts and artifacts only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from compress.evaluation.reports.compare import Comparison
    from compress.evaluation.reports.document import Document, Section
    from compress.evaluation.reports.trend import Trend
    from compress.evaluation.verdict import Verdict

PathLike = str | Path


def compare(paths: Sequence[PathLike], text: str | None = None) -> Comparison:
    """Put scored models side by side, and each after the first in pairs with the first.

    Args:
        paths: eval.json files, or artifacts that carry their scores; at least two.
        text: The scored text that figures are about; the first that all were scored on if None.

    Raises:
        UserError: fewer than two, one that was not scored, or a text that none was scored on.
        IntegrityError: a record is damaged or was edited.
    """
    from compress.evaluation.reports.compare import compare as run
    from compress.evaluation.reports.sources import load_source

    if len(paths) < 2:
        raise UserError("one model alone cannot be compared", "give at least two eval files or artifacts")
    sources = [load_source(path) for path in paths]
    return run([source.record for source in sources], text=text)


def trend(
    directory: PathLike, add: PathLike | None = None, *, commit: str | None = None, release: str | None = None
) -> Trend:
    """Follow gate values over the runs in `directory`/history.jsonl.

    Args:
        directory: Where the history lies.
        add: A verdict file to append to it first; the same run is not added twice.
        commit: The commit that was gated; needed with `add`.
        release: The release that this commit makes, None for any other commit.

    Raises:
        UserError: there is no history, or `add` without a commit.
        IntegrityError: the history or the verdict is damaged or was edited.
        WorkError: the history cannot be written.
    """
    from compress.evaluation.reports.history import append_history, line_of, read_history
    from compress.evaluation.reports.trend import trend as run
    from compress.evaluation.verdict import read_verdict

    if add is not None:
        if commit is None:
            raise UserError("a run is added under its commit, and none is given", "add --commit SHA")
        append_history(directory, line_of(read_verdict(add), commit, release))
    elif release is not None:
        raise UserError("a release is named, but no verdict is added", "give --add verdict.json too")
    return run(read_history(directory))


def report(paths: Sequence[PathLike], verdict: PathLike | None = None) -> Document:
    """One report of artifacts and verdict files; several artifacts are compared first.

    Args:
        paths: Artifacts, or verdict files that `compress gate --output` wrote.
        verdict: The verdict of the one artifact that is given.

    Raises:
        UserError: nothing is given, or a verdict with more than one artifact.
        IntegrityError: an artifact, its scores or the verdict are damaged, or do not belong together.
    """
    from compress.evaluation.reports.artifact_document import NOT_SCORED, artifact_document
    from compress.evaluation.reports.document import Document
    from compress.evaluation.reports.sources import open_artifact, own_record
    from compress.evaluation.reports.verdict_document import verdict_document
    from compress.evaluation.verdict import read_verdict

    if not paths:
        raise UserError("nothing to report on", "give an artifact or a verdict file")
    if verdict is not None and (len(paths) > 1 or is_verdict(paths[0])):
        raise UserError("--verdict belongs to exactly one artifact", "give one artifact, or the verdict file alone")
    judged = None if verdict is None else read_verdict(verdict)
    documents, records = [], []
    for path in paths:
        if is_verdict(path):
            documents.append(verdict_document(read_verdict(path)))
            continue
        if Path(path).is_file():
            raise UserError(
                f"{path} is neither an artifact nor a verdict", "for eval files there is `compress compare`"
            )
        artifact = open_artifact(path)
        record = own_record(artifact)
        documents.append(artifact_document(artifact, record, judged))
        if record is not None:
            records.append(record)
    if len(documents) == 1:
        return documents[0]
    sections: list[Section] = []
    if len(records) > 1:
        from compress.evaluation.reports.compare import compare as side_by_side
        from compress.evaluation.reports.compare_document import comparison_document

        sections += comparison_document(side_by_side(records)).sections
    for document in documents:
        status = f" ({document.status})" if document.status else ""
        sections += [replace(s, heading=f"{document.title}{status}: {s.heading}") for s in document.sections]
    lead = [d.title + (f": {NOT_SCORED}" if NOT_SCORED in d.lead else "") for d in documents]
    return Document(f"{len(documents)} reports", tuple(lead), tuple(sections))


def is_verdict(path: PathLike) -> bool:
    """Whether a path is a file that says it is a verdict, whole or not. Raises IntegrityError for a cut JSON file."""
    if not Path(path).is_file():
        return False
    try:
        value = json.loads(Path(path).read_bytes())
    except ValueError:
        raise IntegrityError(f"{path} is not whole JSON", "write it again: `compress gate ... --output FILE`") from None
    return isinstance(value, dict) and value.get("kind") == "compress.verdict"


def verdict_of(path: PathLike) -> Verdict:
    """The verdict in a file; raises as `read_verdict`."""
    from compress.evaluation.verdict import read_verdict

    return read_verdict(path)
