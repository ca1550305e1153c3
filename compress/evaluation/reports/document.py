"""A report before it has a form: headings, facts, tables and pictures, which HTML and Markdown then write down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of equally many cells. A column whose name starts with `>` is right-aligned.

    `shades`: per cell how strongly it is tinted, 0 to 1, or None; with `bars` how long a bar behind it is instead.
    `prose`: cells are running text, whose line breaks are kept.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    shades: tuple[tuple[float | None, ...], ...] = ()
    bars: bool = False
    prose: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is drawn when a form that can show it asks for it; `alt` says in words what it shows."""

    draw: Callable[[], bytes]
    alt: str


@dataclass(frozen=True, slots=True)
class Section:
    """One part. `folded`: shown on request where the form allows it. `code`: a command to copy."""

    heading: str
    text: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    picture: Picture | None = None
    table: Table | None = None
    code: str | None = None
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report; `status` is a verdict where it has one."""

    title: str
    lead: tuple[str, ...]
    sections: tuple[Section, ...]
    status: str | None = None
