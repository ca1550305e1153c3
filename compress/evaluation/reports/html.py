"""Reports as one HTML file that needs nothing else: style and pictures are inside, no script runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING

from compress.evaluation.reports.document import Document
from compress.evaluation.reports.verbatim import Verbatim, xml_text

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

    from compress.evaluation.records import EvalRecord
    from compress.evaluation.verdict import Verdict

_TEMPLATE = "page.html.j2"
_ID = re.compile(r'(\bid="|(?:xlink:)?href="#|url\(#)')


def render(source: Verdict | Sequence[EvalRecord]) -> str:
    """The page of a verdict, or of records side by side (one alone too)."""
    from compress.evaluation.verdict import Verdict

    if isinstance(source, Verdict):
        from compress.evaluation.reports.verdict_document import verdict_document

        return document(verdict_document(source))
    from compress.evaluation.reports.compare import compare
    from compress.evaluation.reports.compare_document import comparison_document

    return document(comparison_document(compare(source)))


def document(source: Document) -> str:
    """Any report as a page. Equal reports give equal text."""
    return _template().render(page=source).rstrip("\n") + "\n"


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    environment.filters["shown"] = _shown
    environment.filters["cell"] = _cell
    environment.filters["picture"] = inline
    text = resources.files("compress.evaluation.reports").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text)


def _shown(text: str) -> str | Markup:
    """The text without control characters; what is `Verbatim` as code."""
    from markupsafe import Markup

    clean = xml_text(text)
    return Markup("<code>{}</code>").format(clean) if isinstance(text, Verbatim) and clean else clean


def _cell(text: str) -> str | Markup:
    """A cell's text; a number and the bounds behind it break only between the two."""
    from markupsafe import Markup

    shown = _shown(text)
    estimate, found, bounds = shown.partition(" [")
    if isinstance(shown, Markup) or not found:
        return shown
    return Markup('<span class="whole">{}</span> <span class="whole">[{}</span>').format(estimate, bounds)


def inline(drawn: bytes, alt: str, number: int) -> Markup:
    """An SVG file as an element of a page: no prologue, ids of its own, and `alt` for those who do not see it."""
    from markupsafe import Markup, escape

    text = drawn.decode()
    text = text[text.index("<svg") :]
    text = _ID.sub(rf"\g<1>p{number}-", text)
    label = escape(xml_text(alt))
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip())
