"""Text from outside (names of models, items, files) made harmless for each kind of document.

Nothing that a model's directory or an evaluation file is called may forge a row, a tag, a mention, a workflow command
or an ill-formed document.
"""

from __future__ import annotations

import re

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_INLINE = re.compile(r"[\\`*_|~$]|\](?=[(\[:])|!(?=\[)")
_BLOCK = re.compile(r"^(\d*)([-+=#.)\[])")
_CALLS = re.compile(r"([@#])(?=\w)")
_JOINER = "\u2060"


class Verbatim(str):
    """Text that is shown letter by letter: a name, a hash, a command."""

    __slots__ = ()


def xml_text(text: str) -> str:
    """The text without what XML 1.0 forbids: control characters, lone surrogates, the two non-characters."""
    return _NOT_XML.sub("", text)


def one_line(text: str, width: int | None = None) -> str:
    """The text on one line without control characters, cut to `width` characters."""
    line = "".join(c for c in " ".join(xml_text(text).split()) if c.isprintable())
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def markdown(text: str) -> str:
    """The text as it reads, on one line: a `Verbatim` as a code span, the rest with what would be markup escaped.

    An at or number sign before a word gets a joiner behind it, so that it calls nobody and refers to no issue.
    """
    line = one_line(text)
    if isinstance(text, Verbatim):
        return code_span(line)
    escaped = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = _BLOCK.sub(r"\1\\\2", _INLINE.sub(r"\\\g<0>", escaped))
    return _CALLS.sub(rf"\1{_JOINER}", escaped)


def code_span(line: str) -> str:
    """A code span that holds the line whatever backticks are in it, and fits a table cell."""
    if not line:
        return ""
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    room = " " if longest or line != line.strip() else ""
    return f"{fence}{room}{line}{room}{fence}".replace("|", "\\|")


def workflow_data(text: str) -> str:
    """The message of a GitHub workflow command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def workflow_property(text: str) -> str:
    """A property of a GitHub workflow command, such as its title."""
    return workflow_data(text).replace(":", "%3A").replace(",", "%2C")
