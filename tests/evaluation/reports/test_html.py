"""The page: one file that loads nothing, holds every number, and shows what comes from outside as text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compress.evaluation.reports import html
from compress.evaluation.reports.document import Document, Picture, Section, Table
from compress.evaluation.reports.verbatim import Verbatim
from tests.evaluation.gate_records import record
from tests.evaluation.reports.made import NASTY, gate, mixed, verdict

VOID = {"meta", "link", "img", "br", "hr", "input"}
ROOT = Path(__file__).resolve().parents[3]


class Page(HTMLParser):
    """What a browser would see: elements in order, all attributes, the text outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.problems: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"{tag} is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def loads(page: Page, text: str) -> list[str]:
    """Everything that a browser would fetch."""
    found = [f"<{tag}>" for tag in page.tags if tag in ("script", "link", "img", "iframe", "object", "embed", "base")]
    for tag, name, value in page.attributes:
        local = value.startswith("#")
        if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster") and not local:
            found.append(f"{tag} {name}={value}")
        if name.startswith("on") or "javascript:" in value:
            found.append(f"{tag} {name}={value}")
    found += re.findall(r"@import[^;]*|url\((?!#)[^)]*\)", text)
    return found


def ids_and_uses(page: Page) -> tuple[list[str], set[str]]:
    """All ids, and all that is referred to."""
    ids = [value for _, name, value in page.attributes if name == "id"]
    uses = {value[1:] for _, name, value in page.attributes if name in ("href", "xlink:href") and value[:1] == "#"}
    for _, _, value in page.attributes:
        uses |= set(re.findall(r"url\(#([^)]*)\)", value))
    return ids, uses


@pytest.fixture(scope="module")
def of_verdict() -> str:
    return html.render(mixed())


@pytest.fixture(scope="module")
def of_records() -> str:
    return html.render([record(), record()])


def test_a_verdict_is_whole(of_verdict: str) -> None:
    page = Page(of_verdict)
    assert page.problems == []
    assert loads(page, of_verdict) == []
    for shown in (
        "FAIL",
        "0.031 [0.028, 0.034] nats",
        "≤ 0.02 nats",
        "1.41% [1.18%, 1.64%]",
        "item-0",
        mixed().sha256[:16],
    ):
        assert shown in page.text
    assert page.tags.count("svg") == 1
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == ["each gate's estimate with its bounds beside its limit"]


def test_records_have_their_pictures(of_records: str) -> None:
    page = Page(of_records)
    assert page.problems == []
    assert loads(page, of_records) == []
    assert page.tags.count("svg") == 2
    assert "candidate #1 / candidate #2" in page.text


def test_pictures_of_one_page_do_not_mix(of_records: str) -> None:
    ids, uses = ids_and_uses(Page(of_records))
    assert len(ids) == len(set(ids))
    assert uses
    assert uses <= set(ids)


def test_names_from_outside_are_text() -> None:
    base = verdict(gate("kl", "FAIL", message=NASTY, baseline=NASTY), warnings=[NASTY])
    named = base.model_copy(update={"candidate": base.candidate.model_copy(update={"name": NASTY}), "policy": NASTY})
    text = html.render(named)
    page = Page(text)
    assert page.problems == []
    assert loads(page, text) == []
    assert '<script>alert("1")</script>' in page.text
    assert re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text) is None


def test_a_picture_cannot_be_described_out_of_its_attribute() -> None:
    picture = Picture(lambda: b'<?xml version="1.0"?>\n<svg id="a"><use href="#a"/></svg>', '" onload="alert(1)')
    page = Page(html.document(Document("t", (), (Section("s", picture=picture),))))
    assert [name for tag, name, _ in page.attributes if tag == "svg"] == ["role", "aria-label", "id"]


def test_the_check_for_what_is_loaded_can_fail() -> None:
    for bad in (
        '<img src="x.png">',
        "<script>1</script>",
        '<a href="https://example.org/">x</a>',
        "<style>p { background: url(https://example.org/x) }</style>",
        '<p onclick="x">y</p>',
    ):
        assert loads(Page(bad), bad) != []


def test_rows_and_columns() -> None:
    table = Table(("a", ">b"), (("x & y", "1"), (Verbatim("<z>"), "FAIL")))
    text = html.document(Document("t", ("lead",), (Section("s", ("words",), (("k", "v"),), table=table, folded=True),)))
    page = Page(text)
    assert page.problems == []
    assert ("td", "class", "right") in page.attributes
    assert page.tags.count("details") == 1
    assert "<code>&lt;z&gt;</code>" in text
    assert "x &amp; y" in text


SCRIPT = """
import sys
from compress.evaluation.reports import html
from tests.evaluation.gate_records import record
from tests.evaluation.reports.made import mixed
sys.stdout.buffer.write((html.render(mixed()) + html.render([record(), record()])).encode())
"""


def test_equal_input_gives_equal_bytes_in_another_process(of_verdict: str, of_records: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == of_verdict + of_records
