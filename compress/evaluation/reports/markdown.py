"""Reports as Markdown for pull requests and step summaries: short enough for one comment, which CI updates in place.

The comment begins with a marker, so that the next run finds it. GitHub takes at most 65,536 characters; bytes are
counted here, which are never fewer. What does not fit is left out from the end, and the reader is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.evaluation.reports.document import Document, Section, Table
from compress.evaluation.reports.verbatim import markdown

if TYPE_CHECKING:
    from compress.evaluation.verdict import Verdict

MARKER = "<!-- compress-eval -->"
LIMIT = 65_536
_ROOM = 400
"""Bytes kept for the line that says what was left out, and for closing tags."""

_SIGNS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "❔", "WAIVED": "🕒", "SKIPPED": "⏭️"}


def render(verdict: Verdict) -> str:
    """The pull-request comment of a verdict: the marker, the table of gates, the items that turned wrong, details."""
    from compress.evaluation.reports.verdict_document import verdict_document

    return document(verdict_document(verdict), marker=MARKER)


def document(source: Document, *, marker: str = "", limit: int = LIMIT) -> str:
    """Any report as Markdown of less than `limit` bytes; pictures are left out."""
    status = f"{sign(source.status)} **{source.status}** · " if source.status else ""
    lines = [marker] if marker else []
    lines += [f"### {status}{markdown(source.title)}", "", *(f"{markdown(line)}\n" for line in source.lead)]
    room = limit - _ROOM
    text = "\n".join(lines) + "\n"
    left_out = []
    for section in source.sections:
        if not (section.text or section.facts or section.table or section.code):
            continue  # a picture alone
        written = _section(section, room - _bytes(text))
        if written is None:
            left_out.append(section.heading)
        else:
            text += written
    if left_out:
        names = markdown(", ".join(left_out))[:200]
        text += f"\nLeft out, to keep this short: {names}. The JSON has everything.\n"
    return text


def sign(verdict: str) -> str:
    """A sign for a verdict, always shown beside the word."""
    return _SIGNS.get(verdict, "")


def _section(section: Section, room: int) -> str | None:
    """The section in at most `room` bytes, its table cut if it must be; None where not even its heading fits."""
    head = f"\n<details><summary>{section.heading}</summary>\n\n" if section.folded else f"\n#### {section.heading}\n\n"
    tail = "\n</details>\n" if section.folded else ""
    body = "".join(f"{markdown(line)}\n\n" for line in section.text)
    if section.facts:
        body += _table(Table(("", ""), section.facts), room) + "\n"
    if section.code is not None:
        fence = "```"
        while fence in section.code:
            fence += "`"
        body += f"{fence}\n{section.code}\n{fence}\n"
    if _bytes(head + body + tail) > room:
        return None
    if section.table is not None:
        if not section.table.rows:
            return head + body + tail
        rows = _table(section.table, room - _bytes(head + body + tail))
        if not rows:
            return None
        body += rows
    return head + body + tail


def _table(table: Table, room: int) -> str:
    """As many rows as fit, and a last one that says how many do not; empty where not one row fits."""
    rules = ["---:" if column.startswith(">") else "---" for column in table.columns]
    lines = [_row([column.lstrip(">") for column in table.columns]), f"|{'|'.join(rules)}|\n"]
    used = sum(map(_bytes, lines)) + 80
    for number, row in enumerate(table.rows):
        line = _row([_cell(cell) for cell in row])
        used += _bytes(line)
        if used > room:
            rest = len(table.rows) - number
            return "".join(lines) + _row([f"… {rest} more", *[""] * (len(row) - 1)]) if number else ""
        lines.append(line)
    return "".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _cell(cell: str) -> str:
    return f"{sign(cell)} {cell}" if cell in _SIGNS else markdown(cell)


def _bytes(text: str) -> int:
    return len(text.encode())
