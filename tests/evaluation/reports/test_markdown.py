"""The pull-request comment: one table that parses as one, no markup from outside, never too long to be posted."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from compress.evaluation.reports import markdown
from compress.evaluation.reports.document import Document, Section, Table
from compress.evaluation.reports.verbatim import Verbatim
from tests.evaluation.reports.made import NASTY, flipped, gate, mixed, verdict

PARSER = MarkdownIt("commonmark").enable("table")
JOINER = "\u2060"


def tables(text: str) -> list[list[list[str]]]:
    """The tables as a Markdown parser sees them: rows of the cells' visible text."""
    found: list[list[list[str]]] = []
    tokens = PARSER.parse(text)
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open"):
            assert after is not None
            found[-1][-1].append("".join(child.content for child in after.children or []))
    return found


def markup(text: str) -> set[str]:
    """All raw HTML that a parser finds."""
    found = set()
    for token in PARSER.parse(text):
        if token.type == "html_block":
            found |= set(re.findall(r"<[^>]*>", token.content))
        found |= {child.content for child in token.children or [] if child.type == "html_inline"}
    return found


OURS = {"<!-- compress-eval -->", "<details>", "</details>", "<summary>", "</summary>"}


def test_the_comment_has_its_marker_table_items_and_command() -> None:
    text = markdown.render(mixed())
    assert text.startswith("<!-- compress-eval -->\n### ❌ **FAIL** · candidate\n")
    gates, reasons, items, *_ = tables(text)
    assert gates[0] == ["gate", "against", "estimate [bounds]", "limit", "verdict", "role"]
    assert [row[0] for row in gates[1:]] == ["kl", "lambada", "tail", "decode", "memory", "size", "perplexity", "top1"]
    assert gates[1] == ["kl", "root", "0.031 [0.028, 0.034] nats", "≤ 0.02 nats", "❌ FAIL", "primary"]
    assert gates[2][2:4] == ["-1.3 [-2.5, -0.1] points", "≥ -1 points"]
    assert gates[3][2] == "0.7 [0.6, ∞) nats"
    assert gates[7][2:4] == ["1.41% [1.18%, 1.64%]", "≤ 2%"]
    assert reasons[1][0] == "kl"
    assert [row[:3] for row in items[1:]] == [
        ["lambada", "item-0", ""],
        ["blimp", "x", "island"],
        ["lambada", "item-1", ""],
        ["blimp", "x", "island"],
        ["lambada", "item-2", ""],
    ]
    assert "compress gate candidate --baseline root=a-model --baseline last=b-model --policy default" in text
    assert markup(text) == OURS


def test_names_from_outside_stay_text() -> None:
    base = verdict(
        gate("kl", "FAIL", message=NASTY, baseline=NASTY),
        worst=[flipped(NASTY, NASTY, cluster=NASTY)],
        warnings=[NASTY],
    )
    named = base.model_copy(update={"candidate": base.candidate.model_copy(update={"name": NASTY}), "policy": NASTY})
    text = markdown.render(named)
    assert markup(text) <= OURS
    for table in tables(text):
        assert len({len(row) for row in table}) == 1
    assert "<script>alert" in tables(text)[0][1][1]
    links = [c for token in PARSER.parse(text) for c in token.children or [] if c.type in ("link_open", "image")]
    assert links == []
    prose = [c.content for token in PARSER.parse(text) for c in token.children or [] if c.type == "text"]
    assert any("@" in line for line in prose)
    assert not any(re.search(rf"@(?!{JOINER})", line) for line in prose)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.booleans())
def test_any_cell_stays_one_cell(content: str, verbatim: bool) -> None:
    cell = Verbatim(content) if verbatim else content
    text = markdown.document(Document("t", (), (Section("s", table=Table(("a", "b"), ((cell, "end"),))),)))
    rows = tables(text)[0]
    assert [len(row) for row in rows] == [2, 2]
    assert rows[1][1] == "end"
    assert markup(text) == set()
    shown = "".join(rows[1][0].split()).replace(JOINER, "")
    assert shown == "".join(c for c in "".join(content.split()) if c.isprintable())


@pytest.mark.parametrize("letter", ["x", "é", "😀", "|", "<"])
def test_the_comment_can_always_be_posted(letter: str) -> None:
    gates = [gate(f"g{i}", "FAIL", message=letter * 3000) for i in range(3000)]
    worst = [flipped("task", letter * 500 + str(i)) for i in range(50)]
    text = markdown.render(verdict(*gates, worst=worst))
    assert len(text.encode()) < 65_536
    gates_table = tables(text)[0]
    assert re.fullmatch(r"… \d+ more", gates_table[-1][0])
    assert len(gates_table) - 2 + int(gates_table[-1][0].split()[1]) == 3000
    assert "Left out, to keep this short" in text
    assert text.count("<details>") == text.count("</details>")


def test_a_short_report_is_whole() -> None:
    text = markdown.render(mixed())
    assert "Left out" not in text
    assert "more |" not in text
    assert len(text) < 8000


def test_equal_verdicts_give_equal_comments() -> None:
    assert markdown.render(mixed()) == markdown.render(mixed())


def test_a_fence_in_a_command_cannot_end_it() -> None:
    text = markdown.document(Document("t", (), (Section("s", code="a\n```\nb"),)))
    fences = [token.content for token in PARSER.parse(text) if token.type == "fence"]
    assert fences == ["a\n```\nb\n"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab1 .)-+=#>[]()!:`*_~|<&@$\\\n\t"), min_size=1, max_size=25))
def test_any_line_stays_a_paragraph_that_reads_the_same(content: str) -> None:
    text = markdown.document(Document("t", (content,), ()))
    tokens = [token for token in PARSER.parse(text) if token.type != "inline"]
    expected = ["heading_open", "heading_close"] + (["paragraph_open", "paragraph_close"] if content.strip() else [])
    assert [token.type for token in tokens] == expected
    if content.strip():
        inline = [token for token in PARSER.parse(text) if token.type == "inline"][1]
        assert {child.type for child in inline.children or []} <= {"text", "text_special"}
        shown = "".join(child.content for child in inline.children or [])
        assert shown.replace(JOINER, "") == " ".join(content.split())
