"""Which text to score on, and what its documents are: a known text by name, or a UTF-8 file by path.

Documents, by rules that look at the source alone:

- a file named `*.jsonl`: one JSON object per line, its string `text` is a document;
- a text with WikiText's top-level headings (` = Title = ` on a line of its own): each heading starts a document;
- a packaged text: an empty line separates documents, as its SOURCE.md says;
- anything else is one document. In plain files an empty line mostly separates paragraphs, so it decides nothing there.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from compress import content
from compress.errors import UserError

DEFAULT = "tales_heldout"

_HEADING = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)
_EMPTY_LINE = re.compile(r"\n[ \t]*\n")


@dataclass(frozen=True, slots=True)
class Text:
    """A text as its documents in order, its name in records, and the SHA-256 of its bytes.

    Every document holds more than white space.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str


def packaged() -> list[str]:
    """Names of the texts that ship with the package."""
    names = (entry.name for entry in content.eval_dir().joinpath("data").iterdir())
    return sorted(name.removesuffix(".txt") for name in names if name.endswith(".txt"))


def read_text(source: str | Path) -> Text:
    """Reads a packaged text, one of the data directory's (`wikitext-2`), or a file.

    Raises:
        UserError: there is none, it is not UTF-8, a `.jsonl` line holds no text, or all of it is white space.
        IntegrityError: a file of the data directory is not the one that scores are compared on.
    """
    shipped = str(source) in packaged()
    path = content.eval_dir().joinpath("data", f"{source}.txt") if shipped else Path(source)
    if not path.exists():
        path = _known(source) or path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"evaluation text {str(source)!r} is neither a known name nor a readable file: {error.strerror}",
            f"packaged: {', '.join(packaged())}; or give the path of a UTF-8 text file",
        ) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"evaluation text {source} is not UTF-8 (byte {error.start})", "convert it: iconv -t utf-8"
        ) from error
    rows = path.suffix == ".jsonl"
    parts = _rows(text, str(source)) if rows else split_documents(text, empty_lines=shipped)
    documents = tuple(part for part in parts if part.strip())
    if not documents:
        raise UserError("the evaluation text is empty", "give a text with at least a few thousand words")
    name = Path(source).name.removesuffix(".txt").removesuffix(".jsonl")
    return Text(name, documents, hashlib.sha256(data).hexdigest())


def _known(source: str | Path) -> Path | None:
    """The data directory's file of that name; None for anything else."""
    from compress.evaluation.harness.data import find_text

    return find_text(str(source))


def split_documents(text: str, *, empty_lines: bool) -> list[str]:
    """The documents of a text: from one WikiText heading to the next, else between empty lines, else all of it.

    What stands before the first heading goes with it, so no character of a WikiText is lost.
    """
    headings = [match.start() for match in _HEADING.finditer(text)]
    if len(headings) > 1:
        starts = [0, *headings[1:], len(text)]
        return [text[a:b] for a, b in pairwise(starts)]
    return _EMPTY_LINE.split(text) if empty_lines else [text]


def _rows(text: str, source: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        document = row.get("text") if isinstance(row, dict) else None
        if not isinstance(document, str):
            raise UserError(
                f"{source}, line {number}: no JSON object with a string `text`",
                'write one document per line, as {"text": "..."}',
            )
        documents.append(document)
    return documents
